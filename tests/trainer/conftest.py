from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from radio_cache.reader import Cache
from radio_cache.testing import make_tiny_cache, write_images
from trainer.data import CropData
from trainer.order import FullOrder
from trainer.recipe import Recipe, everywhere
from trainer.recipes import quick


@pytest.fixture
def tiny_cache(tmp_path: Path) -> Cache:
    """Eight images of two colours, one of them unusable, seen by a teacher with a summary and one without."""
    write_images(tmp_path / "images")
    return make_tiny_cache(tmp_path / "cache.zarr", tmp_path / "images", unusable=["red/1.png"])


@pytest.fixture
def tiny_recipe() -> Recipe:
    """A few seconds of training: three images of 32 pixels a step."""
    recipe = everywhere(quick(), image_px=32, batch_images=3, steps=8, warmup_steps=2)
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
        order = FullOrder(rows, seed, group.batch_images)
        return CropData(cache, teachers, recipe, rows, order, seed=seed, image_px=group.image_px, grid_hw=grid_hw)

    return make
