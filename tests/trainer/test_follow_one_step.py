"""The lists of CONTRIBUTING.md that follow one image through a training step are the way of the code."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tracing import call_chains, documented_chain

import trainer.objective.objective
from radio_cache.reader import Cache
from trainer.cli import main
from trainer.data.crops import CropData
from trainer.objective.targets import TargetMaker
from trainer.students import Student

START = "trainer/cli.py:main"

STEPS: dict[str, tuple[Any, str]] = {
    "From the command to the pixels of a crop:": (CropData, "read_pixels"),
    "From the command to the targets of a crop:": (TargetMaker, "__call__"),
    "From the command to the student:": (Student, "forward"),
    "From the command to a loss:": (trainer.objective.objective, "spatial_match"),
}
"""Title of a list in CONTRIBUTING.md -> the call that it leads to."""


@pytest.mark.parametrize("title", STEPS)
def test_a_documented_list_is_the_way_of_a_real_step(title: str, tiny_cache: Cache, tmp_path: Path) -> None:
    arguments = ["--cache", str(tiny_cache.path), "--out", str(tmp_path / "run"), "--steps", "2", "--batch-size", "2"]
    arguments += ["--image-size", "32", "--set", "adaptor_width=8", "--device", "cpu"]
    owner, function = STEPS[title]
    with call_chains(owner, function, start=START) as chains:
        result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    # Before the first step, and in evaluations, other functions lead there, too.
    of_steps = {
        tuple(name for name in chain if "<" not in name)  # without comprehensions
        for chain in chains
        if "trainer/loop.py:run_steps" in chain and "trainer/run/evaluation.py:Evaluation.metrics_after" not in chain
    }
    documented = documented_chain(title)
    assert of_steps == {documented[:-1]}
    assert documented[-1].endswith(function)
    # The first function is the command: as many hops as functions after it.
    assert len(documented) - 1 <= 7
