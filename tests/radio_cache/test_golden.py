"""Caches kept in the repository: format version 1 is read for ever.

v1.zarr is from before receipts, attributes and the image index carried checksums of their own and before the index had a
group of its own; v1-sealed.zarr from before shards had labels; v1-labelled.zarr is as caches are written now.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import zarr

from radio_cache import Cache
from radio_cache.checks.verify import verify_cache
from radio_cache.errors import MissingRowsError

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    """The script that made it: the formulas of the numbers."""
    spec = importlib.util.spec_from_file_location("make_v1", GOLDEN / "make_v1.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["v1.zarr", "v1-sealed.zarr", "v1-labelled.zarr"])
def cache(request: pytest.FixtureRequest) -> Cache:
    return Cache(GOLDEN / request.param)


def test_golden_images_read_as_they_were_written(cache: Cache) -> None:
    assert cache.num_images == 5
    assert cache.index.keys == [
        "photos/cat/Mädchen mit Katze.jpg",
        "photos/cat/2.png",
        "photos/dog/1.jpg",
        "train-000.tar/broken.jpg",
        "train-000.tar/0001.jpg",
    ]
    assert cache.index.labels.tolist() == [0, 0, 1, -1, 1]
    assert cache.index.offset.tolist() == [-1, -1, -1, 512, 1536]
    assert cache.index.length.tolist() == [-1, -1, -1, 0, 700]
    assert [cache.meta.containers[number].kind for number in cache.index.container] == ["folder"] * 3 + ["tar"] * 2
    assert cache.sizes_hw.tolist() == [[100, 200], [101, 201], [102, 202], [0, 0], [104, 204]]
    assert cache.digests[:, 15].tolist() == [0, 1, 2, 3, 4]
    assert [(failure.row, failure.reason) for failure in cache.failures()] == [(3, "the file is empty (0 bytes)")]
    assert cache.meta.class_names == ("cat", "dog")


def test_golden_maps_read_as_they_were_written(cache: Cache) -> None:
    assert list(cache.teachers) == ["golden-a", "golden-b"]
    maps = cache.teachers["golden-a"].maps([4, 0])
    assert maps.shape == (2, 2, 3, 3)
    assert maps[0].tolist() == [
        [[4.0, 4.015625, 4.03125], [4.0625, 4.078125, 4.09375], [4.125, 4.140625, 4.15625]],
        [[4.25, 4.265625, 4.28125], [4.3125, 4.328125, 4.34375], [4.375, 4.390625, 4.40625]],
    ]
    np.testing.assert_array_equal(maps[1], maps[0] - 4)
    np.testing.assert_array_equal(cache.teachers["golden-b"].maps([2])[0, :, :, 0], maps[0, :, :, 0] - 2)


def test_golden_summaries_and_statistics_read_as_they_were_written(cache: Cache) -> None:
    teacher = cache.teachers["golden-a"]
    assert teacher.summaries([2, 4]).tolist() == [[20, 19.875, 19.75, 19.625], [40, 39.875, 39.75, 39.625]]
    mean, std = teacher.summary_mean_std()
    np.testing.assert_allclose(mean, [17.5, 17.375, 17.25, 17.125])  # rows 0, 1, 2 and 4
    np.testing.assert_allclose(std, [np.sqrt(218.75)] * 4)
    mean, std = teacher.spatial_mean_std()
    np.testing.assert_allclose(mean, 1.75 + 0.125 + 0.0625 + np.arange(3) / 64)
    np.testing.assert_allclose(std, [np.sqrt(2.1875 + 0.125**2 + 2 / 3 * 0.0625**2)] * 3)


def test_golden_shards_without_receipt_are_not_usable(cache: Cache) -> None:
    assert cache.usable_rows(["golden-a"]).tolist() == [0, 1, 2, 4]
    assert cache.usable_rows(["golden-b"]).tolist() == [0, 1, 2]
    with pytest.raises(MissingRowsError):
        cache.teachers["golden-b"].codes([4])


def test_golden_spec_tells_the_geometry(cache: Cache) -> None:
    spec = cache.teachers["golden-a"].spec
    assert (spec.geometry.fit, spec.geometry.input_hw, spec.geometry.grid_hw) == ("crop", (32, 48), (2, 3))
    assert (spec.geometry.stride_px, spec.geometry.offset_px, spec.geometry.resize_px) == (16.0, 8.0, 40)
    assert (spec.summary_dim, cache.teachers["golden-b"].spec.summary_dim) == (4, None)


def test_golden_caches_pass_verification(cache: Cache) -> None:
    report = verify_cache(cache, deep=True)
    assert report.damages == ()
    assert report.missing == {"images": 0, "golden-a": 0, "golden-b": 1}


def test_zarr_python_reads_the_golden_cache(recipe: ModuleType) -> None:
    maps = np.asarray(zarr.open_group(GOLDEN / "v1.zarr", mode="r")["teachers/golden-a/spatial"][0])
    for row in (0, 1, 2, 4):
        np.testing.assert_array_equal(maps[row], recipe.map_of(row, 3))
    assert np.isnan(maps[3]).all()


def test_this_release_still_writes_the_bytes_of_the_golden_cache(tmp_path: Path, recipe: ModuleType) -> None:
    """Of all numbers and receipts; what a JSON document says, the other tests read."""
    recipe.make(tmp_path / "v1-labelled.zarr")

    def stored(folder: Path) -> dict[str, bytes]:
        files = (file for file in folder.rglob("*") if file.is_file() and file.name != "zarr.json")
        return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}

    assert stored(tmp_path / "v1-labelled.zarr") == stored(GOLDEN / "v1-labelled.zarr")
