"""Two real processes over gloo: the same training as one, and a run that is killed and goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from radio_cache.reader import Cache
from radio_cache.testing import make_tiny_cache, write_images
from trainer.loop import train
from trainer.recipe import Group, Recipe, Stage, everywhere
from trainer.train_config import TrainConfig

# No draws of the network's own (every position, none dropped), and no batch norm, whose statistics are each process's.
PLAIN_VIT = {"width": 24, "depth": 2, "heads": 2, "max_resolution": 32, "position_drop": 0.0, "num_summary_tokens": 1}


def start(arguments: list[str], rank: int, port: int) -> subprocess.Popen[str]:
    environment = {
        **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "trainer.cli", *arguments, "--device", "cpu"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run_two(cache: Cache, recipe: Recipe, out: Path) -> list[subprocess.Popen[str]]:
    file = out.with_suffix(".json")
    file.write_text(json.dumps(recipe.to_json()))
    port = free_port()
    return [
        start(["--cache", str(cache.path), "--out", str(out), "--recipe", str(file)], rank, port) for rank in (0, 1)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> str:
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs[0][1]


@pytest.fixture
def two_groups(tiny_recipe: Recipe) -> Recipe:
    """Two stages; in the second, half of the processes take one teacher and half the other."""
    first = Stage(name="low", steps=2, lr=1e-3, warmup_steps=0, groups=(Group(image_px=32, batch_images=4),))
    groups = (
        Group(teachers=("fake-a",), image_px=32, batch_images=4),
        Group(teachers=("fake-b",), image_px=32, batch_images=2),
    )
    second = Stage(name="both", steps=3, lr=1e-3, warmup_steps=0, groups=groups)
    return replace(
        tiny_recipe, student="vit-tiny-16", student_overrides=PLAIN_VIT, stages=(first, second), checkpoint_every=1,
        log_every=1, accumulate=1,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_as_one_does(two_groups: Recipe, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    cache = make_tiny_cache(tmp_path / "c.zarr", tmp_path / "images")
    processes = run_two(cache, two_groups, tmp_path / "two")
    train(TrainConfig(cache=cache.path, recipe=two_groups, out=tmp_path / "one"))
    ended(processes)
    one, two = (load_file(tmp_path / name / "student.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, weights in one.items():
        torch.testing.assert_close(
            two[name], weights, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
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
    tiny_cache: Cache, two_groups: Recipe, tmp_path: Path
) -> None:
    recipe = replace(everywhere(two_groups, steps=40), student="e-radio-tiny", student_overrides={})
    ended(run_two(tiny_cache, recipe, tmp_path / "whole"))
    for wait_for in (5, 20):
        processes = run_two(tiny_cache, recipe, tmp_path / "cut")
        while not any(int(p.stem[5:]) >= wait_for for p in (tmp_path / "cut/checkpoints").glob("step-*.pt")):
            assert all(process.poll() is None for process in processes)
            time.sleep(0.01)
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    assert "going on from step-" in ended(run_two(tiny_cache, recipe, tmp_path / "cut"))
    whole, cut = (load_file(tmp_path / name / "student.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_with_a_checkpoint(
    tiny_cache: Cache, two_groups: Recipe, tmp_path: Path
) -> None:
    processes = run_two(tiny_cache, everywhere(two_groups, steps=4000), tmp_path / "run")
    while not list((tmp_path / "run/checkpoints").glob("step-*.pt")):
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [143, 143], outputs
    assert "with a checkpoint saved. Go on with: radio-train" in outputs[0][1]
