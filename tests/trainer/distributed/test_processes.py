"""Two real processes over gloo: the same training as one, and a run that is killed and goes on."""

import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from radio_cache.reader import Cache
from radio_cache.testing import make_tiny_cache, write_images
from trainer.loop import train
from trainer.recipes.recipe import Recipe, override_stages
from trainer.train_config import TrainConfig

if TYPE_CHECKING:
    from conftest import TwoProcesses


@pytest.mark.slow
def test_two_processes_train_as_one_does(two: "TwoProcesses", two_groups: Recipe, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    cache = make_tiny_cache(tmp_path / "c.zarr", tmp_path / "images")
    processes = two.run(cache, two_groups, tmp_path / "two")
    train(TrainConfig(cache=cache.path, recipe=two_groups, out=tmp_path / "one"))
    two.ended(processes)
    two.trained_as(tmp_path / "one", tmp_path / "two")
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for mine, theirs in zip(*logs, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)
        for teacher, parts in mine["teachers"].items():
            for part, value in parts.items():
                assert theirs["teachers"][teacher][part] == (None if value is None else pytest.approx(value, rel=1e-4))


@pytest.mark.slow
def test_two_processes_killed_twice_go_on_to_the_same_weights(
    two: "TwoProcesses", tiny_cache: Cache, two_groups: Recipe, tmp_path: Path
) -> None:
    recipe = replace(override_stages(two_groups, steps=40), student="e-radio-tiny", student_overrides={})
    two.ended(two.run(tiny_cache, recipe, tmp_path / "whole"))
    for wait_for in (5, 20):
        two.killed(two.run(tiny_cache, recipe, tmp_path / "cut"), tmp_path / "cut", step=wait_for)
    assert "going on from step-" in two.ended(two.run(tiny_cache, recipe, tmp_path / "cut"))
    whole, cut = (load_file(tmp_path / name / "student.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_with_a_checkpoint(
    two: "TwoProcesses", tiny_cache: Cache, two_groups: Recipe, tmp_path: Path
) -> None:
    processes = two.run(tiny_cache, override_stages(two_groups, steps=4000), tmp_path / "run")
    while not list((tmp_path / "run/checkpoints").glob("step-*.pt")):
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [143, 143], outputs
    assert "with a checkpoint saved. Resume with: torchrun --nproc-per-node 2 -m trainer.cli" in outputs[0][1]
