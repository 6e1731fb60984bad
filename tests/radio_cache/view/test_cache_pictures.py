"""Pictures of a cache: where a map lies on its image, what was not seen, and which images may be shown."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from radio_cache.errors import MissingRowsError
from radio_cache.geometry.crops import patch_geometry
from radio_cache.reader import Cache
from radio_cache.testing import make_tiny_cache, write_images
from radio_cache.view.cache_pictures import cache_pictures
from radio_cache.view.picture_grid import Pane


def shown(cache: Cache, **changes: int) -> list[list[Pane]]:
    return cache_pictures(cache, tuple(cache.teachers), **{"count": 4, **changes})


def test_a_row_shows_one_image_and_its_maps_in_its_own_shape(cache: Cache) -> None:
    rows = shown(cache)
    assert len(rows) == 4
    for row in rows:
        assert [title for title, _ in row[1:]] == list(cache.teachers)
        assert {picture.shape for _, picture in row} == {row[0][1].shape}
        key = row[0][0]
        number = next(n for n in range(cache.num_images) if cache.index.key(n) == key)
        height, width = cache.sizes_hw[number]
        assert row[0][1].shape[0] == pytest.approx(224 * height / max(height, width), abs=1)
        assert row[0][1].shape[1] == 224, "columns stay columns, whatever the shapes of images"


def test_the_same_seed_shows_the_same_images_and_another_one_others(cache: Cache) -> None:
    keys = [[row[0][0] for row in shown(cache, seed=seed)] for seed in (0, 0, 1, 2)]
    assert keys[0] == keys[1]
    assert keys[0] != keys[2] or keys[0] != keys[3]


def test_an_image_whose_file_is_gone_still_shows_its_maps(tmp_path: Path) -> None:
    write_images(tmp_path / "photos")
    cache = make_tiny_cache(tmp_path / "c.zarr", tmp_path / "photos")
    row = shown(cache, count=100)[0]
    (tmp_path / "photos" / row[0][0]).unlink()
    again = next(panes for panes in shown(Cache(tmp_path / "c.zarr"), count=100) if panes[0][0] == row[0][0])
    assert np.all(again[0][1] == 255)
    np.testing.assert_array_equal(again[1][1], row[1][1])


@pytest.mark.parametrize(("fit", "seen"), [("squash", slice(0, 224)), ("crop", slice(56, 168)), ("pad", slice(0, 224))])
def test_what_a_teacher_did_not_see_is_white(tmp_path: Path, fit: str, seen: slice) -> None:
    """Twice as wide as high: a centre crop cuts a quarter off at the left and at the right."""
    (tmp_path / "photos/any").mkdir(parents=True)
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (48, 96, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"photos/any/{number}.png")
    cache = make_tiny_cache(tmp_path / "c.zarr", tmp_path / "photos", teachers={"fake-a": (None, 8)})
    teacher = cache.teachers["fake-a"]
    geometry = patch_geometry(32, 8, fit=fit, interpolation="bilinear")  # pyright: ignore[reportArgumentType]
    teacher.spec = replace(teacher.spec, geometry=geometry)
    for row in shown(cache):
        white = np.all(row[1][1] == 255, axis=(0, 2))
        assert not white[seen].any()
        assert np.delete(white, seen).all()


def test_levels_of_a_teacher_share_their_colours(tmp_path: Path, photos: Path) -> None:
    cache = make_tiny_cache(tmp_path / "c.zarr", photos, teachers={"fake-a": (None, 8), "fake-a@64": (None, 8)})
    for _, (_, small), (_, large) in shown(cache):
        difference = np.abs(small.astype(int) - large.astype(int)).mean()
        assert difference < 64, "maps of the same image in the same colours"


def test_a_cache_without_a_finished_image_says_so(cache: Cache) -> None:
    for receipt in (cache.path / "receipts/fake-a").glob("*.json"):
        receipt.unlink()
    with pytest.raises(MissingRowsError, match="no image yet that fake-a, fake-b finished"):
        shown(cache)
