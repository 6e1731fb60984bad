"""A step that does not fit into memory is refused before it is tried, with what makes it fit."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from radio_cache.errors import TrainingError
from radio_cache.reader import Cache
from trainer.distributed.processes import Processes
from trainer.loop import train
from trainer.recipes.recipe import Recipe, Shuffle, override_stages
from trainer.run import step as training_run
from trainer.run.step import TrainingRun
from trainer.run.step_memory import available_bytes, refuse_oversized_step, saved_activation_bytes
from trainer.train_config import TrainConfig


def test_what_a_pass_keeps_is_counted_once_and_without_weights() -> None:
    linear, x = nn.Linear(100, 200, bias=False), torch.rand(50, 100)
    kept = saved_activation_bytes(lambda: torch.relu(linear(x)), linear.parameters())
    assert kept == 4 * (50 * 100 + 50 * 200)  # the input of the matrix, and the output of relu


def test_the_count_grows_with_the_images(tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path) -> None:
    run = TrainingRun(TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=tmp_path / "run"), Processes())
    run.model.eval()
    data = run.groups[0, 0]
    batches = [data.batch(0, 0, number) for number in (1, 2, 3)]
    counts = [
        saved_activation_bytes(functools.partial(run._pass, data, batch), run.model.parameters()) for batch in batches
    ]
    assert counts[1] > counts[0]
    assert counts[2] - counts[1] == pytest.approx(counts[1] - counts[0], rel=0.1)


def test_a_step_that_does_not_fit_names_the_number_of_passes_that_does(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(
        cache=tiny_cache.path, recipe=override_stages(tiny_recipe, batch_images=64, image_px=64), out=tmp_path / "run"
    )
    monkeypatch.setattr(training_run, "available_bytes", lambda: 100e6)
    message = r"a step of stages.0.groups.0 needs about 0\.\d GB .* --set accumulate=\d+"
    with pytest.raises(TrainingError, match=message) as caught:
        train(config)
    assert not (tmp_path / "run").exists()
    passes = int(str(caught.value).partition("accumulate=")[2].split()[0])
    train(replace(config, recipe=replace(override_stages(config.recipe, steps=1), accumulate=passes)))


def test_nothing_that_is_trained_changes_by_the_count(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(tiny_recipe, balancing="adaloss")
    states: list[dict[str, torch.Tensor]] = []
    for counted in (True, False):
        if not counted:
            monkeypatch.setattr(TrainingRun, "_refuse_too_large_steps", lambda _: None)
        run = TrainingRun(TrainConfig(cache=tiny_cache.path, recipe=recipe, out=tmp_path / "run"), Processes())
        assert run.model.training
        states.append({**run.model.state_dict(), **run.objective.balancing.state_dict()})
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(
    ("images", "available", "cure"),
    [
        (60, 3e9, "--set accumulate=4"),
        (60, 1.05e9, "--set accumulate=120 "),
        (60, 1.0e9, "a smaller --image-size or student"),
    ],
)
def test_the_cure_fits(images: int, available: float, cure: str) -> None:
    with pytest.raises(TrainingError, match=cure):
        refuse_oversized_step(
            per_image=0.05e9, images=images, fixed=1e9, path="x", processes=1, accumulate=2, available=available
        )
    for enough in (None, 4.1e9):
        refuse_oversized_step(
            per_image=0.05e9, images=images, fixed=1e9, path="x", processes=1, accumulate=2, available=enough
        )


def test_what_is_available_is_the_least_of_machine_and_container(tmp_path: Path) -> None:
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    assert available_bytes(meminfo, cgroup) is None
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:  5000 kB\nSwapFree: 1000 kB\n")
    assert available_bytes(meminfo, cgroup) == 6000 * 1024
    cgroup.mkdir()
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("3000\n")
    (cgroup / "memory.stat").write_text("anon 1\ninactive_file 500\nactive_file 500\n")
    assert available_bytes(meminfo, cgroup) == 6000 * 1024
    (cgroup / "memory.max").write_text("10000\n")
    assert available_bytes(meminfo, cgroup) == 8000


@pytest.mark.parametrize("shuffle", ["blocks", "full"])
def test_batches_of_one_image_are_trained_in_either_order(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path, shuffle: Shuffle
) -> None:
    for batch_images in (1, 2):
        recipe = replace(
            override_stages(tiny_recipe, batch_images=batch_images),
            shuffle=shuffle,
            student="vit-tiny-16",
            student_overrides={"width": 24, "depth": 1, "heads": 2},
        )
        TrainingRun(TrainConfig(cache=tiny_cache.path, recipe=recipe, out=tmp_path / "run"), Processes())
