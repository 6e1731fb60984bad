from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from radio_cache.errors import ConfigError, MissingRowsError, TrainingError
from radio_cache.reader import Cache
from radio_cache.testing import make_tiny_cache
from radio_cache.torch import crop_maps
from trainer.data.crops import eval_box_xyxy, shifted_box_xyxy, student_pixels
from trainer.data.loader import BatchLoader
from trainer.data.schedule import Schedule
from trainer.data.selection import usable_rows
from trainer.objective.targets import TargetMaker
from trainer.recipes.recipe import Recipe, override_stages

if TYPE_CHECKING:
    from conftest import MakeData

TEACHERS = ("fake-a", "fake-b")


def test_every_usable_image_comes_once_an_epoch(tiny_cache: Cache, tiny_recipe: Recipe, make_data: "MakeData") -> None:
    data = make_data(tiny_cache, TEACHERS, tiny_recipe, (2, 2))
    rows = np.concatenate([data.crops(step, 0, 3).rows for step in range(7)])  # 21 images: three epochs of seven
    usable = tiny_cache.usable_rows(TEACHERS).tolist()
    assert len(usable) == 7
    epochs = [rows[i : i + 7].tolist() for i in (0, 7, 14)]
    assert all(sorted(epoch) == usable for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_order_and_crops_depend_only_on_seed_and_step(
    tiny_cache: Cache, tiny_recipe: Recipe, make_data: "MakeData"
) -> None:
    groups = {(0, 0): make_data(tiny_cache, TEACHERS, tiny_recipe, (2, 2))}
    with BatchLoader(Schedule(tiny_recipe), groups, 0, 6, device=torch.device("cpu"), threads=3) as loader:
        # The feed's memory is used again for later batches: keep copies.
        prefetch_map = [loaded.batch.map(torch.clone) for loaded in loader]
    alone = make_data(tiny_cache, TEACHERS, tiny_recipe, (2, 2)).batch(4, 0, 3)
    assert len(prefetch_map) == 6
    np.testing.assert_array_equal(prefetch_map[4].rows, alone.rows)
    np.testing.assert_array_equal(prefetch_map[4].pixels, alone.pixels)
    np.testing.assert_array_equal(prefetch_map[4].teachers[0].levels[0].rows, alone.teachers[0].levels[0].rows)
    other = make_data(tiny_cache, TEACHERS, replace(tiny_recipe, seed=1), (2, 2)).batch(4, 0, 3)
    assert (other.pixels != alone.pixels).any()


def test_pixels_of_a_cache_that_keeps_its_images_smaller_are_cut_at_the_same_place(
    tiny_cache: Cache, tiny_recipe: Recipe, make_data: "MakeData", monkeypatch: pytest.MonkeyPatch
) -> None:
    def ramp(divisor: int) -> Callable[[Any, int], Image.Image]:
        def image(_: Any, row: int, least_px: int | None = None) -> Image.Image:
            h, w = (int(side) for side in tiny_cache.sizes_hw[row])
            y, x = (np.mgrid[0 : h // divisor, 0 : w // divisor] + 0.5) * divisor
            return Image.fromarray(np.stack([x * 250 / w, y * 250 / h, x * 0], axis=-1).astype(np.uint8))

        return image

    data = make_data(tiny_cache, TEACHERS, tiny_recipe, (2, 2))
    monkeypatch.setattr(type(data), "image", ramp(1))
    whole = data.batch(3, 0, 3).pixels.clone()
    monkeypatch.setattr(type(data), "image", ramp(2))
    halved = data.batch(3, 0, 3).pixels
    assert whole.float().std() > 10
    assert (whole.float() - halved.float()).abs().mean() < 4


def test_a_target_is_what_the_teacher_said_of_the_pixels_in_the_crop(
    tmp_path: Path, tiny_recipe: Recipe, make_data: "MakeData"
) -> None:
    """Pixels and targets are cut at the same place: a smooth ramp, seen by a teacher that reports colours, ties them."""
    from radio_cache.testing import fake_features, fake_spec, make_tiny_cache

    y, x = np.mgrid[0:64, 0:96]
    ramp = np.stack([x * 2, y * 3, 255 - x - y], axis=-1).astype(np.uint8)
    (tmp_path / "images/ramp").mkdir(parents=True)
    Image.fromarray(ramp).save(tmp_path / "images/ramp/0.png")
    cache = make_tiny_cache(tmp_path / "c.zarr", tmp_path / "images", teachers={"colours": (None, 12)})
    recipe = replace(override_stages(tiny_recipe, batch_images=1), crop_area=(0.3, 0.6), normalise="none")
    data = make_data(cache, ("colours",), recipe, (4, 4))
    make = TargetMaker(cache, data.levels["colours"].all, recipe, data.sampler.rows(0, 0, 1), torch.device("cpu"))
    spec = fake_spec("colours", summary_dim=None, spatial_dim=12)
    errors, mirrored = [], []
    for step in range(20):
        batch = data.batch(step, 0, 1)
        targets = make(batch.teachers[0])
        _, said = fake_features(
            Image.fromarray(batch.pixels[0].numpy()), spec
        )  # on the 4 x 4 grid of the 32 px crop itself
        target = targets.spatial[0].numpy().reshape(4, 4, 12)
        # The outer half token of the whole image has no neighbour to interpolate with; look inside.
        errors.append(np.abs(target - said)[1:3, 1:3].max() / np.ptp(said))
        mirrored.append(np.abs(target[:, ::-1] - said)[1:3, 1:3].max() / np.ptp(said))
    assert max(errors) < 0.06
    assert min(mirrored) > 3 * max(errors)


def test_standardised_targets_have_the_statistics_of_the_cache_removed(
    tiny_cache: Cache, tiny_recipe: Recipe, make_data: "MakeData"
) -> None:
    teacher = tiny_cache.teachers["fake-a"]
    data = make_data(tiny_cache, ("fake-a",), tiny_recipe, (4, 4))
    part = data.batch(0, 0, 3).teachers[0]
    plain = replace(tiny_recipe, normalise="none", normalise_summary="none")
    raw, scaled = (
        TargetMaker(tiny_cache, data.levels["fake-a"].all, recipe, tiny_cache.usable_rows(), torch.device("cpu"))(part)
        for recipe in (plain, tiny_recipe)
    )
    mean, std = teacher.spatial_mean_std()
    np.testing.assert_allclose(scaled.spatial.numpy() * std + mean, raw.spatial.numpy(), rtol=1e-4, atol=1e-4)
    assert raw.summary is not None
    assert scaled.summary is not None
    summary_mean, summary_std = teacher.summary_mean_std()
    np.testing.assert_allclose(
        scaled.summary.numpy() * summary_std + summary_mean, raw.summary.numpy(), rtol=1e-3, atol=1e-3
    )


def test_crop_maps_is_two_matrix_products_in_row_major_order() -> None:
    generator = torch.Generator().manual_seed(0)
    maps, rows, columns = (torch.rand(2, *shape, generator=generator) for shape in ((3, 4, 5), (2, 3), (6, 4)))
    expected = torch.stack(
        [torch.einsum("ij,jwc,kw->ikc", rows[b], maps[b], columns[b]).reshape(12, 5) for b in range(2)]
    )
    torch.testing.assert_close(crop_maps(maps, rows, columns), expected)


def test_an_image_that_changed_since_the_build_stops_training_by_name(
    tiny_cache: Cache, tiny_recipe: Recipe, make_data: "MakeData"
) -> None:
    folder = Path(tiny_cache.meta.containers[0].path)
    for file in folder.rglob("*.png"):
        file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(TrainingError, match=r"image (red|blue)/\d.png of .*has changed since the cache was built"):
        make_data(tiny_cache, TEACHERS, tiny_recipe, (2, 2)).batch(0, 0, 3)


def test_an_unfinished_cache_is_refused_unless_it_may_be_one(tiny_cache: Cache) -> None:
    receipts = sorted((tiny_cache.path / "receipts/fake-a").iterdir())
    receipts[0].unlink()
    with pytest.raises(MissingRowsError, match=r"'fake-a' has seen 4 of 8 images: .* with --allow-partial"):
        usable_rows(Cache(tiny_cache.path), TEACHERS, allow_partial=False)
    assert usable_rows(Cache(tiny_cache.path), TEACHERS, allow_partial=True).tolist() == [4, 6, 7]
    receipts[1].unlink()
    with pytest.raises(ConfigError, match="has no image that is complete for fake-a, fake-b"):
        usable_rows(Cache(tiny_cache.path), TEACHERS, allow_partial=True)


def test_student_pixels_of_a_box_are_that_part_of_the_image() -> None:
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8, 1).repeat(3, axis=2))
    np.testing.assert_array_equal(student_pixels(image, (4, 4), (2, 4, 6, 8)), np.asarray(image)[4:8, 2:6])
    assert student_pixels(image, (2, 3)).shape == (2, 3, 3)


def test_the_eval_crop_is_the_centre_square_that_crop_teachers_see() -> None:
    assert eval_box_xyxy((40, 80), "squash", 0.875) is None
    assert eval_box_xyxy((40, 80), "crop", 0.875) == (22.5, 2.5, 57.5, 37.5)
    assert eval_box_xyxy((40, 80), "crop", 1.0) == (20.0, 0.0, 60.0, 40.0)


def test_a_shifted_crop_shows_what_the_target_shows_whole_tokens_away(
    tiny_cache: Cache, tiny_recipe: Recipe, make_data: "MakeData"
) -> None:
    rng, box, within = np.random.default_rng(0), (4.0, 8.0, 20.0, 24.0), (0.0, 0.0, 64.0, 64.0)
    seen = set()
    for _ in range(200):
        moved, (down, right) = shifted_box_xyxy(rng, box, within, (4, 4), 1.0)
        assert moved == (4.0 + 4 * right, 8.0 + 4 * down, 20.0 + 4 * right, 24.0 + 4 * down)
        assert min(moved) >= 0
        seen.add((down, right))
    # 4 pixels a token: one token to the left still fits, two do not; two are half the overlap.
    assert seen == {(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)}
    data = make_data(tiny_cache, TEACHERS, replace(tiny_recipe, shift_tokens=1.0, crop_area=(0.2, 0.3)), (4, 4))
    shifts = [data.batch(step, 0, 3).shift_yx for step in range(4)]
    assert any(shift is not None and shift.any() for shift in shifts)
    assert make_data(tiny_cache, TEACHERS, tiny_recipe, (4, 4)).batch(0, 0, 3).shift_yx is None


def test_targets_lie_on_the_larger_grid_where_the_recipe_says_so(
    tiny_cache: Cache, tiny_recipe: Recipe, make_data: "MakeData"
) -> None:
    recipe = replace(tiny_recipe, target_grid="larger")
    grid = tiny_cache.teachers["fake-a"].spec.geometry.grid_hw
    for student_hw in ((2, 2), (9, 9)):
        data = make_data(tiny_cache, ("fake-a",), recipe, student_hw)
        targets = TargetMaker(
            tiny_cache, data.levels["fake-a"].all, recipe, tiny_cache.usable_rows(), torch.device("cpu")
        )(data.batch(0, 0, 3).teachers[0])
        assert targets.grid_hw == (max(student_hw[0], grid[0]), max(student_hw[1], grid[1]))
        assert targets.spatial.shape[1] == targets.grid_hw[0] * targets.grid_hw[1]


def test_a_smaller_copy_of_an_image_is_cut_at_the_same_place(
    tmp_path: Path, tiny_recipe: Recipe, make_data: "MakeData", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches may keep images smaller than the build saw them, and large JPEGs are decoded at a fraction of their size."""
    y, x = np.mgrid[0:512, 0:640]
    waves = np.stack([128 + 100 * np.sin(x / 60), 128 + 100 * np.cos(y / 50), (x + y) / 5], axis=-1).astype(np.uint8)
    (tmp_path / "images/a").mkdir(parents=True)
    Image.fromarray(waves).save(tmp_path / "images/a/0.jpg", quality=95)
    cache = make_tiny_cache(tmp_path / "c.zarr", tmp_path / "images", teachers={"colours": (None, 4)})
    data = make_data(cache, ("colours",), override_stages(tiny_recipe, batch_images=1), (4, 4))
    whole, sizes = data.image, list[tuple[int, int]]()

    def shown(image: Callable[[int, int | None], Image.Image]) -> np.ndarray:
        def watched(row: int, least_px: int | None = None) -> Image.Image:
            made = image(row, least_px)
            sizes.append(made.size)
            return made

        monkeypatch.setattr(data, "image", watched)
        return np.concatenate([data.batch(number, 0, 1).pixels.numpy() for number in range(8)]).astype(int)

    fast = shown(whole)
    assert max(sizes) < (640, 512)
    exact = shown(lambda row, least_px: whole(row))
    assert np.abs(fast - exact).max() <= 8
    assert np.abs(shown(lambda row, least_px: whole(row).resize((320, 256))) - exact).max() <= 8
    beside = shown(lambda row, least_px: whole(row).crop((12, 0, 640, 512)).resize((640, 512)))
    assert np.abs(beside - exact).max() > 8  # a dozen pixels beside would be seen
