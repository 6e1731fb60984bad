from dataclasses import replace
from pathlib import Path

import pytest

from radio_cache.reader import Cache
from radio_cache.testing import make_tiny_cache, write_images
from trainer.recipes import Recipe, quick


@pytest.fixture
def tiny_cache(tmp_path: Path) -> Cache:
    """Eight images of two colours, one of them unusable, seen by a teacher with a summary and one without."""
    write_images(tmp_path / "images")
    return make_tiny_cache(tmp_path / "cache.zarr", tmp_path / "images", unusable=["red/1.png"])


@pytest.fixture
def tiny_recipe() -> Recipe:
    """A few seconds of training: three images of 32 pixels a step."""
    return replace(
        quick(),
        name="tiny",
        image_px=32,
        steps=8,
        batch_images=3,
        warmup_steps=2,
        adaptor_width=16,
        log_every=2,
        checkpoint_every=3,
    )
