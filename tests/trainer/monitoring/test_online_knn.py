import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from radio_cache.reader import Cache
from radio_cache.testing import make_tiny_cache, write_images
from trainer.distributed.processes import Processes
from trainer.loop import train
from trainer.monitoring.online_knn import OnlineKnn, knn_predictions
from trainer.monitoring.pictures import feature_picture
from trainer.recipes.recipe import Recipe, override_stages
from trainer.run.step import TrainingRun
from trainer.train_config import TrainConfig


def test_neighbours_vote_by_cosine_and_lengths_do_not_matter() -> None:
    angles = torch.cat([torch.linspace(0, 0.1, 25), torch.linspace(1.5, 1.6, 15)])
    bank = torch.stack([angles.cos(), angles.sin()], 1) * torch.linspace(1, 9, 40)[:, None]
    labels = (angles > 1).long()
    queries = torch.tensor([[5.0, 0.2], [0.01, 1.0]])
    assert knn_predictions(bank, labels, queries).tolist() == [0, 1]


def test_class_numbers_may_be_identifiers() -> None:
    bank, labels = torch.eye(3), torch.tensor([1_000_000_007, 999_999_937, 5])
    assert knn_predictions(bank[:2], labels[:2], bank[:2] + 0.1).tolist() == [1_000_000_007, 999_999_937]


def test_a_run_tells_its_quality_keeps_the_best_and_draws_what_it_sees(tmp_path: Path, tiny_recipe: Recipe) -> None:
    write_images(tmp_path / "images", per_class=8)
    cache = make_tiny_cache(tmp_path / "c.zarr", tmp_path / "images")
    recipe = replace(override_stages(tiny_recipe, steps=6), knn_every=2, picture_every=3, ema=0.9)
    whole, cut = tmp_path / "whole", tmp_path / "plain"
    train(TrainConfig(cache=cache.path, recipe=recipe, out=whole))
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "knn" in line] == [2, 4, 6]
    assert all(0 <= line["knn"] <= 1 for line in lines)
    assert all(line["knn_error"] == pytest.approx((line["knn"] * (1 - line["knn"]) / 4) ** 0.5) for line in lines)
    best = torch.load(whole / "checkpoints/best.pt", weights_only=True)
    assert best["best"] == max(line["knn"] for line in lines)
    assert best["best_error"] == next(line["knn_error"] for line in lines if line["knn"] == best["best"])
    assert sorted(path.name for path in (whole / "pictures").iterdir()) == ["step-00000003.png", "step-00000006.png"]
    with Image.open(whole / "pictures/step-00000006.png") as image:
        assert image.size == (6 * 164 - 4, 2 * 164 - 4)
    # Looking does not change what is trained.
    train(TrainConfig(cache=cache.path, recipe=replace(recipe, knn_every=0, picture_every=0), out=cut))
    states = [torch.load(run / "checkpoints/step-00000006.pt", weights_only=True) for run in (whole, cut)]
    for part in ("student", "adaptors"):
        assert all(torch.equal(states[0][part][name], states[1][part][name]) for name in states[0][part])


def test_images_without_labels_are_no_reason_to_stop(tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(override_stages(tiny_recipe, steps=2), knn_every=1)  # seven images are too few to measure on
    train(TrainConfig(cache=tiny_cache.path, recipe=recipe, out=tmp_path / "run"))
    assert "knn" not in (tmp_path / "run/metrics.jsonl").read_text()


def test_equal_maps_have_equal_colours_in_a_picture() -> None:
    maps = np.random.default_rng(0).normal(size=(2, 3, 3, 5)).astype(np.float32)
    canvas = feature_picture(np.zeros((2, 8, 8, 3), np.uint8), {"a": (maps, maps), "b": (maps, -maps)})
    cell = lambda row, column: canvas[row * 164 : row * 164 + 160, column * 164 : column * 164 + 160]  # noqa: E731
    np.testing.assert_array_equal(cell(0, 1), cell(0, 2))
    assert (cell(1, 1) != cell(1, 2)).any()


def test_classes_of_one_image_each_are_not_measured(tmp_path: Path, tiny_recipe: Recipe) -> None:
    write_images(tmp_path / "images", classes=[f"class{n}" for n in range(9)], per_class=1)
    cache = make_tiny_cache(tmp_path / "c.zarr", tmp_path / "images")
    train(
        TrainConfig(
            cache=cache.path, recipe=replace(override_stages(tiny_recipe, steps=2), knn_every=1), out=tmp_path / "run"
        )
    )
    assert "knn" not in (tmp_path / "run/metrics.jsonl").read_text()


def test_the_queries_are_held_out_where_there_are_enough(tmp_path: Path, tiny_recipe: Recipe) -> None:
    write_images(tmp_path / "images", per_class=40)
    cache = make_tiny_cache(tmp_path / "c.zarr", tmp_path / "images")
    config = TrainConfig(cache=cache.path, recipe=replace(tiny_recipe, holdout=0.5), out=tmp_path / "run")
    run = TrainingRun(config, Processes())
    assert len(run.held_out_rows) >= 8
    monitor = OnlineKnn.of(run.cache, run.groups[0, 0], run.rows, run.held_out_rows, run.model.config)
    assert monitor is not None
    assert (len(monitor.bank), len(monitor.queries)) == (len(run.rows), len(run.held_out_rows))
    assert (
        len({row for group in run.groups.values() for row in group.sampler.rows(0, 0, 3)} & {*run.held_out_rows}) == 0
    )
    few = OnlineKnn.of(run.cache, run.groups[0, 0], run.rows, run.held_out_rows[:3], run.model.config)
    assert few is not None
    assert len(few.bank) + len(few.queries) == len(run.rows)
