import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from radio_cache.reader import Cache
from radio_cache.testing import make_tiny_cache, write_images
from trainer.data.crops import CropData
from trainer.data.sampler import FullSampler
from trainer.recipes.presets import quick
from trainer.recipes.recipe import Group, Recipe, Stage, override_stages


@pytest.fixture
def tiny_cache(tmp_path: Path) -> Cache:
    """Eight images of two colours, one of them unusable, seen by a teacher with a summary and one without."""
    write_images(tmp_path / "images")
    return make_tiny_cache(tmp_path / "cache.zarr", tmp_path / "images", unusable=["red/1.png"])


@pytest.fixture
def tiny_recipe() -> Recipe:
    """A few seconds of training: three images of 32 pixels a step."""
    recipe = override_stages(quick(), image_px=32, batch_images=3, steps=8, warmup_steps=2)
    return replace(recipe, name="tiny", adaptor_width=16, log_every=2, checkpoint_every=3)


MakeData = Callable[..., CropData]


@pytest.fixture
def make_data() -> MakeData:
    """make_data(cache, teachers, recipe, grid_hw) -> what the recipe's only group sees of the cache."""

    def make(cache: Cache, teachers: tuple[str, ...], recipe: Recipe, grid_hw: tuple[int, int]) -> CropData:
        [stage] = recipe.stages
        [group] = stage.groups
        rows = cache.usable_rows(teachers)
        seed = (recipe.seed, 0, 0)
        order = FullSampler(rows, seed, group.batch_images)
        return CropData(cache, teachers, recipe, rows, order, seed=seed, image_px=group.image_px, grid_hw=grid_hw)

    return make


# No draws of the network's own (every position, none dropped), and no batch norm, whose statistics are each process's.
_PLAIN_VIT = {"width": 24, "depth": 2, "heads": 2, "max_resolution": 32, "position_drop": 0.0, "num_summary_tokens": 1}


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
        tiny_recipe,
        student="vit-tiny-16",
        student_overrides=_PLAIN_VIT,
        stages=(first, second),
        checkpoint_every=1,
        log_every=1,
        accumulate=1,
    )


Started = list[subprocess.Popen[str]]


class TwoProcesses:
    """Two real processes of the trainer over gloo, as torchrun would start them."""

    def run(self, cache: Cache, recipe: Recipe, out: Path) -> Started:
        file = out.with_suffix(".json")
        file.write_text(json.dumps(recipe.to_json()))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = int(free.getsockname()[1])
        arguments = ["--cache", str(cache.path), "--out", str(out), "--recipe", str(file)]
        return [self._start(arguments, rank, port) for rank in (0, 1)]

    def ended(self, processes: Started) -> str:
        """What the first one said, once both are done well."""
        outputs = [process.communicate(timeout=300) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
        return outputs[0][1]

    def killed(self, processes: Started, out: Path, step: int) -> None:
        """Kill both as soon as a checkpoint of that step or a later one is there; they must not have ended before."""
        while not any(int(p.stem[5:]) >= step for p in (out / "checkpoints").glob("step-*.pt")):
            assert all(process.poll() is None for process in processes)
            time.sleep(0.01)
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()

    def trained_as(self, one: Path, two: Path) -> None:
        """Both runs ended with the same student, but for rounding."""
        mine, theirs = (load_file(run / "student.safetensors") for run in (one, two))
        assert mine.keys() == theirs.keys()
        for name, weights in mine.items():
            torch.testing.assert_close(
                theirs[name], weights, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )

    def _start(self, arguments: list[str], rank: int, port: int) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "trainer.cli", *arguments, "--device", "cpu"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def two() -> TwoProcesses:
    return TwoProcesses()
