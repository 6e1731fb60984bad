"""A student as LLaVA's vision tower, with a small random language model; lmms-eval's place is taken by a stand-in."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import LlavaForConditionalGeneration

from evals.cli import main
from evals.commands.vlm import VLM_TASKS
from evals.errors import EvalError
from evals.vlm import TASKS, HarnessConfig, check_wiring, harness, run_harness
from radio_cache.errors import ConfigError

WRITTEN = {
    "results": {
        "gqa": {"alias": "gqa", "exact_match,none": 0.5, "exact_match_stderr,none": 0.1},
        "pope": {"alias": "pope", "pope_accuracy,none": 0.75},
    }
}
HARNESS = """
import json, sys
from pathlib import Path
from transformers import AutoConfig
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = given["--model_args"].split(",")[0].removeprefix("pretrained=")
assert type(AutoConfig.from_pretrained(folder).vision_config).__name__ == "StudentTowerConfig"
made = Path(given["--output_path"]) / "model"
made.mkdir(parents=True)
(made / "now_results.json").write_text(json.dumps({"results": {"gqa": {"exact_match,none": 0.5}}}))
"""


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    """A folder that looks like a saved LLaVA with a student in it."""
    folder = tmp_path / "llava"
    folder.mkdir()
    vision = {"model_type": "radio-student-tower"}
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "vision_config": vision}))
    (folder / "processor_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("head", [None, "alpha"])
def test_the_check_builds_saves_loads_and_asks_a_llava(
    make_run: Callable[..., Path], tmp_path: Path, head: str | None
) -> None:
    run, record = make_run("run", tmp_path / "none.zarr"), tmp_path / "out.json"
    arguments = ["vlm", "--check", "--run", str(run), "--json", str(record), *(["--adaptor", head] if head else [])]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    wiring = json.loads(record.read_text())
    assert (wiring["teacher"], wiring["tokens"]) == (head or "backbone", 4)
    assert len(wiring["held"]) == result.stdout.count("holds: ") == 6
    assert "holds: another picture gives other logits" in result.stdout


def test_a_tower_that_does_not_see_is_told(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlavaForConditionalGeneration.forward

    def blind(self: Any, pixel_values: Any = None, **rest: Any) -> Any:
        return forward(self, pixel_values=None if pixel_values is None else pixel_values * 0, **rest)

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", blind)
    with pytest.raises(EvalError, match="this does not hold: another picture gives other logits"):
        check_wiring(make_run("run", tmp_path / "none.zarr"))


def test_figures_are_read_from_what_lmms_eval_wrote(
    llava: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: object())
    asked: list[list[str]] = []

    def answer(command: list[str], *, check: bool) -> SimpleNamespace:
        asked.append(command)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "now_results.json").write_text(json.dumps(WRITTEN))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", answer)
    arguments = ["vlm", "--llava", str(llava), "--task", "gqa", "--task", "pope", "--limit", "8", "--device", "cpu"]
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "out"), "--json", str(tmp_path / "r.json")])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["task"], row["value"]) for row in rows] == [("gqa", 0.5), ("pope", 0.75)]
    assert "vision tower: radio-student-tower" in " ".join(result.stdout.split())
    words = " ".join(asked[0][3:])
    assert f"pretrained={llava},device=cpu,device_map=cpu --tasks gqa,pope --batch_size 1" in words
    assert words.endswith("--limit 8")


def test_what_is_missing_is_named(llava: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tuple(TASKS) == VLM_TASKS
    config = HarnessConfig(llava=llava, out=tmp_path / "out", device="cpu")
    with pytest.raises(EvalError, match=r"pip install lmms-eval"):
        run_harness(config)
    monkeypatch.setattr(harness, "find_spec", lambda name: object())
    monkeypatch.setattr(subprocess, "run", lambda command, check: SimpleNamespace(returncode=3))
    with pytest.raises(EvalError, match="ended with exit code 3"):
        run_harness(config)
    monkeypatch.setattr(subprocess, "run", lambda command, check: SimpleNamespace(returncode=0))
    with pytest.raises(EvalError, match=r"wrote no \*results.json"):
        run_harness(config)
    (llava / "processor_config.json").unlink()
    with pytest.raises(EvalError, match="holds no processor"):
        run_harness(config)
    (llava / "config.json").write_text('{"model_type": "bert", "vision_config": {"model_type": "x"}}')
    with pytest.raises(EvalError, match="a model of the type bert"):
        run_harness(config)
    (llava / "config.json").write_text("{}")
    with pytest.raises(EvalError, match="holds no LLaVA of transformers"):
        run_harness(config)
    with pytest.raises(EvalError, match=r"holds no config\.json"):
        run_harness(HarnessConfig(llava=tmp_path, out=tmp_path))
    with pytest.raises(ConfigError, match="no task is called 'gqaa'"):
        HarnessConfig(llava=llava, out=tmp_path, tasks=("gqaa",))
    with pytest.raises(ConfigError, match="no path with a comma"):
        HarnessConfig(llava=Path("a,b"), out=tmp_path)
    for arguments in ([], ["--check"], ["--check", "--run", "r", "--llava", "l"], ["--run", "r"]):
        result = CliRunner().invoke(main, ["vlm", *arguments])
        assert result.exit_code != 0
        assert "give --check and --run FOLDER, or --llava FOLDER" in result.output


@pytest.mark.slow
def test_the_process_that_loads_the_llava_knows_students(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lmms_eval").mkdir()
    (tmp_path / "lmms_eval" / "__init__.py").touch()
    (tmp_path / "lmms_eval" / "__main__.py").write_text(HARNESS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    (row,) = run_harness(HarnessConfig(llava=llava, out=tmp_path / "out", tasks=("gqa",), device="cpu")).rows
    assert (row.metric, row.value) == ("exact_match,none", 0.5)
