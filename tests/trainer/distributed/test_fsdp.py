"""A student divided among two real processes over gloo: the same training, checkpoints and student as whole."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from radio_cache.errors import ConfigError
from radio_cache.reader import Cache
from radio_cache.testing import make_tiny_cache, write_images
from trainer.loop import train
from trainer.model.files import load_student
from trainer.recipes.recipe import Recipe
from trainer.train_config import TrainConfig

if TYPE_CHECKING:
    from conftest import TwoProcesses


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def recipe(two_groups: Recipe) -> Recipe:
    return replace(two_groups, ema=0.9, clip_grad_norm=0.5, knn_every=2)


@pytest.mark.slow
def test_a_divided_student_trains_as_a_whole_one(two: "TwoProcesses", recipe: Recipe, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    cache = make_tiny_cache(tmp_path / "c.zarr", tmp_path / "images")
    processes = two.run(cache, replace(recipe, fsdp=True), tmp_path / "two")
    train(TrainConfig(cache=cache.path, recipe=recipe, out=tmp_path / "one"))
    two.ended(processes)
    two.trained_as(tmp_path / "one", tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    load_student(tmp_path / "two")(torch.zeros(1, 3, 32, 32))
    saved = [torch.load(tmp_path / name / "checkpoints/step-00000005.pt", weights_only=True) for name in ("one", "two")]
    for part in ("student", "adaptors"):
        for name, value in saved[0][part].items():
            torch.testing.assert_close(saved[1][part][name], value, rtol=1e-4, atol=1e-5)
    moments = [state["optimizer"]["state"] for state in saved]
    assert moments[0].keys() == moments[1].keys()
    for number, values in moments[0].items():
        torch.testing.assert_close(moments[1][number]["exp_avg"], values["exp_avg"], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_divided_run_killed_goes_on_to_the_weights_of_a_whole_one(
    two: "TwoProcesses", tiny_cache: Cache, recipe: Recipe, tmp_path: Path
) -> None:
    # Power iteration goes a step with every pass, so that it is compared with as many processes.
    recipe = replace(recipe, student_overrides={**recipe.student_overrides, "spectral_reparam": True})
    first, second = (replace(stage, steps=steps) for stage, steps in zip(recipe.stages, (3, 9), strict=True))
    plain = replace(recipe, stages=(first, second))
    two.ended(two.run(tiny_cache, plain, tmp_path / "plain"))
    recipe = replace(plain, fsdp=True)
    two.ended(two.run(tiny_cache, recipe, tmp_path / "whole"))
    two.killed(two.run(tiny_cache, recipe, tmp_path / "cut"), tmp_path / "cut", step=5)
    assert "going on from step-" in two.ended(two.run(tiny_cache, recipe, tmp_path / "cut"))
    whole, cut, undivided = (load_file(tmp_path / name / "student.safetensors") for name in ("whole", "cut", "plain"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    for name, weights in undivided.items():
        torch.testing.assert_close(whole[name], weights, rtol=1e-3, atol=1e-5)


def test_one_process_is_told_to_start_several(tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fsdp=true divides a student among processes, and there is one"):
        train(TrainConfig(cache=tiny_cache.path, recipe=replace(tiny_recipe, fsdp=True), out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
