from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from radio_cache.reader import Cache
from radio_cache.testing import fake_features, fake_spec, make_tiny_cache
from trainer.loop import train
from trainer.objective.targets import TargetMaker
from trainer.recipes.recipe import Recipe, override_stages
from trainer.train_config import TrainConfig

NAMES = ("colours",)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Smooth ramps, seen at 32 and at 64 pixels by a teacher that reports colours."""
    y, x = np.mgrid[0:64, 0:96]
    (tmp_path / "images/ramp").mkdir(parents=True)
    for number in range(4):
        ramp = np.stack([x * 2, y * 3, 255 - x - y - number], axis=-1).astype(np.uint8)
        Image.fromarray(ramp).save(tmp_path / f"images/ramp/{number}.png")
    teachers = {"colours": (4, 12), "colours@64": (4, 12)}
    return make_tiny_cache(tmp_path / "c.zarr", tmp_path / "images", teachers=teachers)


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    return replace(override_stages(tiny_recipe, batch_images=4), crop_area=(0.2, 1.0), normalise="none")


def test_a_crop_is_compared_with_the_level_of_its_magnification(cache: Cache, recipe: Recipe, make_data: Any) -> None:
    data = make_data(cache, NAMES, recipe, (4, 4))
    levels = data.levels["colours"]
    whole, half = (0.0, 0.0, 96.0, 64.0), (20.0, 10.0, 68.0, 42.0)
    assert [levels.for_crop(box, (64, 96)) for box in (whole, half)] == [0, 1]
    # A student of twice the size sees the whole at the magnification of the larger level.
    larger = replace(levels, reference=1)
    assert [larger.for_crop(box, (64, 96)) for box in (whole, half)] == [1, 1]
    assert [replace(levels, match="off").for_crop(box, (64, 96)) for box in (whole, half)] == [0, 0]


def test_targets_of_both_levels_are_what_the_teacher_says_of_the_crop(
    cache: Cache, recipe: Recipe, make_data: Any
) -> None:
    data = make_data(cache, NAMES, recipe, (4, 4))
    make = TargetMaker(cache, data.levels["colours"].all, recipe, cache.usable_rows(), torch.device("cpu"))
    spec = fake_spec("colours", summary_dim=4, spatial_dim=12)
    used: set[int] = set()
    for number in range(6):
        batch = data.batch(number, 0, 4)
        used |= {part.level for part in batch.teachers[0].levels}
        targets = make(batch.teachers[0]).spatial.numpy().reshape(4, 4, 4, 12)
        for place in range(4):
            said = fake_features(Image.fromarray(batch.pixels[place].numpy()), spec)[1]
            # The outer half token of the whole image has no neighbour to interpolate with; look inside.
            assert np.abs(targets[place] - said)[1:3, 1:3].max() < 0.06 * np.ptp(said)
    assert used == {0, 1}


def test_crops_may_be_drawn_so_that_a_level_fits(cache: Cache, recipe: Recipe, make_data: Any) -> None:
    def areas(settings: Recipe) -> np.ndarray:
        data = make_data(cache, NAMES, settings, (4, 4))
        boxes = [box for number in range(40) for box in data.crops(number, 0, 4).boxes]
        return np.array([(x1 - x0) * (y1 - y0) / (64 * 96) for x0, y0, x1, y1 in boxes])

    drawn = areas(replace(recipe, match="draw", crop_ratio=(1.0, 1.0)))
    near = [np.abs(np.log(drawn / area)) < 0.31 for area in (0.25, 1.0)]
    assert (near[0] | near[1]).all()
    assert 50 < near[0].sum() < 110
    assert not (np.abs(np.log(areas(recipe) / 0.25)) < 0.31).all()


def test_a_student_has_one_head_for_all_levels_of_a_teacher(cache: Cache, recipe: Recipe, tmp_path: Path) -> None:
    for match in ("off", "nearest", "draw"):
        settings = replace(override_stages(recipe, steps=2), match=match, normalise="phi-s")
        train(TrainConfig(cache=cache.path, recipe=settings, out=tmp_path / match))
    from trainer.model.files import load_student

    assert load_student(tmp_path / "draw", adaptors="all").heads == NAMES
