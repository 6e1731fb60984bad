"""The example of CONTRIBUTING.md: an evaluation of one file is run as it stands there."""

import json
import re
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from evals.cli import COMMANDS, main
from radio_cache.terminal.output import allow_module_option


def test_the_eval_of_contributing_is_a_command_and_measures(
    make_cache, make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [section] = re.findall(r"^## Adding an eval\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    [code] = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    command = names["uniformity"]
    assert isinstance(command, click.Command)
    monkeypatch.setattr(main, "commands", dict(main.commands))
    main.add_command(allow_module_option(command))

    cache = make_cache("bank")
    run, record = make_run("run", cache.path), tmp_path / "uniformity.json"
    assert "uniformity" in CliRunner().invoke(main, ["--help"]).output
    result = CliRunner().invoke(main, ["uniformity", "--run", str(run), "--json", str(record)])
    assert result.exit_code == 0, result.output
    values = json.loads(record.read_text())["uniformity"]
    assert list(values) == ["alpha", "student", "student, untrained"]
    assert f"{values['student']:.3f}" in result.stdout

    features = cache.teachers["alpha"].summaries(range(20)).astype(np.float64)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    potentials = [np.exp(-2 * ((a - b) ** 2).sum()) for i, a in enumerate(features) for b in features[:i]]
    assert values["alpha"] == pytest.approx(np.log(np.mean(potentials)), abs=1e-4)


def test_every_command_of_the_list_is_one_of_radio_eval() -> None:
    assert {command.name for command in COMMANDS} == set(main.commands)
