"""Stored views as training targets: what the teacher said of just the pixels that the student sees, mirrored ones too."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from cache_builder.build import build_cache
from cache_builder.build_config import BuildConfig
from cache_builder.pipeline.preprocess import teacher_input
from cache_builder.teachers import TeacherOptions, load_teacher
from radio_cache.errors import ConfigError
from radio_cache.geometry.views import ViewSampling
from radio_cache.reader import Cache
from trainer.data.crops import CropData
from trainer.data.sampler import FullSampler
from trainer.loop import train
from trainer.objective.targets import TargetMaker
from trainer.recipes.presets import quick
from trainer.recipes.recipe import Recipe, override_stages
from trainer.train_config import TrainConfig


@pytest.fixture
def cache(tmp_path: Path, fake_teachers: tuple[str, ...]) -> Cache:
    """Smooth pictures with three extra views each, half of them mirrored."""
    (tmp_path / "images/a").mkdir(parents=True)
    y, x = np.mgrid[0:96, 0:128]
    for number in range(4):
        spot = 120 * np.exp(-((x - 30 - 20 * number) ** 2 + (y - 40) ** 2) / 600)
        Image.fromarray(np.stack([x, spot, 200 - y], -1).astype(np.uint8)).save(tmp_path / f"images/a/{number}.png")
    sampling = ViewSampling(seed=0, area=(0.2, 0.6), ratio=(0.8, 1.25), flip_share=0.5)
    options = TeacherOptions(views=4, view_sampling=sampling)
    teachers = dict.fromkeys(fake_teachers, options)
    config = BuildConfig(images=(str(tmp_path / "images"),), teachers=teachers, out=tmp_path / "c.zarr", threads=1)
    return build_cache(config).cache


@pytest.fixture
def recipe() -> Recipe:
    made = override_stages(quick(), image_px=32, batch_images=4, steps=2, warmup_steps=0)
    return replace(made, views=1.0, normalise="none", normalise_summary="none", adaptor_width=8)


def test_a_stored_view_is_the_target_of_its_own_pixels(cache: Cache, recipe: Recipe, fake_module: ModuleType) -> None:
    rows = cache.usable_rows(["fake-a"])
    data = CropData(cache, ["fake-a"], recipe, rows, FullSampler(rows, (0,), 4), seed=(0,), image_px=32, grid_hw=(4, 4))
    make = TargetMaker(cache, data.levels["fake-a"].all, recipe, rows, torch.device("cpu"))
    teacher = load_teacher("fake-a")
    seen: set[tuple[int, bool]] = set()
    for number in range(8):
        crops = data.crops(number, 0, 4)
        seen |= set(zip(crops.views, crops.flipped, strict=True))
        batch = data.batch(number, 0, 4)
        targets = make(batch.teachers[0])
        live = teacher(teacher_input(batch.pixels, [(32, 32)] * 4, teacher.spec.normalisation))
        assert targets.summary is not None
        assert live.summary is not None
        # The student's pixels are resized bicubically, the teacher's bilinearly: near, not equal.
        assert (targets.spatial - live.spatial.flatten(1, 2)).abs().max() < 0.15
        assert (targets.summary - live.summary).abs().max() < 0.1
        assert targets.valid.all()
        torch.testing.assert_close(targets.coverage, torch.ones(4))
    assert {view for view, _ in seen} == {1, 2, 3}
    assert {flipped for _, flipped in seen} == {False, True}


def test_a_part_of_the_images_may_be_views_and_the_rest_fresh_crops(
    cache: Cache, recipe: Recipe, tmp_path: Path
) -> None:
    rows = cache.usable_rows(["fake-a"])
    mixed = replace(recipe, views=0.5)
    data = CropData(cache, ["fake-a"], mixed, rows, FullSampler(rows, (0,), 4), seed=(0,), image_px=32, grid_hw=(4, 4))
    views = [view for number in range(30) for view in data.crops(number, 0, 4).views]
    assert 40 < views.count(0) < 80
    report = train(TrainConfig(cache=cache.path, recipe=mixed, out=tmp_path / "run"))
    assert report.steps == 2


def test_a_cache_without_views_is_told_how_to_get_them(tmp_path: Path, recipe: Recipe) -> None:
    from radio_cache.testing import make_tiny_cache, write_images

    write_images(tmp_path / "plain")
    plain = make_tiny_cache(tmp_path / "p.zarr", tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"teacher 'fake-a' has none: --set views=0, or build a cache with --views K"):
        train(TrainConfig(cache=plain.path, recipe=recipe, out=tmp_path / "run"))
