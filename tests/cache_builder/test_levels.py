"""One teacher at several input sizes: each has a group of its own, and everything that knows groups knows levels."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cache_builder.build import BuildReport
from cache_builder.teachers import TeacherOptions, load_recorded, load_teacher
from radio_cache import Cache
from radio_cache.checks.verify import drop_teacher, verify_cache
from radio_cache.codecs.calibrate import CodecRequest
from radio_cache.errors import ConfigError, CorruptShardError, StaleCacheError
from radio_cache.format.codec_record import CodecRecord
from radio_cache.view.info import teacher_infos

Build = Callable[..., BuildReport]

SMALL, LARGE = TeacherOptions(), TeacherOptions(size_px=64, level_of="fake-a")
LEVELS = {"fake-a": SMALL, "fake-a@64": LARGE}


@pytest.fixture
def leveled(build: Build) -> Cache:
    return build(teachers=LEVELS).cache


def files(cache: Cache) -> dict[str, bytes]:
    folders = (path for unit in LEVELS for path in (f"teachers/{unit}", f"receipts/{unit}"))
    return {path: cache.storage.read(path) for folder in folders for path, _ in cache.storage.list_files(folder)}


def test_every_level_holds_what_the_teacher_says_at_that_size(
    leveled: Cache, ten_images: Path, seen_by: Callable[..., torch.Tensor]
) -> None:
    assert leveled.teachers.names() == ("fake-a",)
    small, large = leveled.teachers.levels("fake-a")
    assert (small.name, small.spec.level_of, small.spec.geometry.grid_hw) == ("fake-a", None, (4, 4))
    assert (large.name, large.spec.level_of, large.spec.geometry.grid_hw) == ("fake-a@64", "fake-a", (8, 8))
    for level, options in ((small, SMALL), (large, LARGE)):
        teacher = load_teacher("fake-a", options)
        for row, key in enumerate(leveled.index.keys):
            out = teacher(seen_by(teacher, Image.open(ten_images / key).convert("RGB")))
            torch.testing.assert_close(torch.from_numpy(level.maps([row])), out.spatial, atol=1e-3, rtol=1e-3)
            assert out.summary is not None
            torch.testing.assert_close(torch.from_numpy(level.summaries([row])), out.summary, atol=1e-3, rtol=1e-3)
        assert np.isfinite(level.spatial_mean_std()[1]).all()


def test_levels_are_checked_and_listed_like_teachers(leveled: Cache) -> None:
    report = verify_cache(leveled, deep=True)
    assert report.ok
    assert report.shards["fake-a@64"] == 4
    infos = teacher_infos(leveled)
    assert [(info.name, info.input_hw) for info in infos] == [("fake-a", (32, 32)), ("fake-a@64", (64, 64))]


def test_a_level_added_later_leaves_the_others_alone_and_has_the_same_bytes(
    build: Build, leveled: Cache, tmp_path: Path
) -> None:
    alone = build(teachers={"fake-a": SMALL}, out=tmp_path / "later.zarr").cache
    before = files(alone)
    report = build(teachers=LEVELS, out=tmp_path / "later.zarr")
    assert [(result.name, result.images) for result in report.results] == [("fake-a", 0), ("fake-a@64", 10)]
    after = files(report.cache)
    assert {path: after[path] for path in before} == before
    assert after == files(leveled)


def test_every_level_has_a_codec_of_its_own(build: Build) -> None:
    codec = CodecRecord.of_request(CodecRequest(name="int8"))
    cache = build(teachers={name: replace(options, codec=codec) for name, options in LEVELS.items()}).cache
    small, large = (level.codec.arrays()["scale"] for level in cache.teachers.levels("fake-a"))
    assert small.shape == large.shape
    assert (small != large).any()


def test_a_dropped_level_leaves_the_teacher_and_a_dropped_teacher_its_levels(leveled: Cache, tmp_path: Path) -> None:
    other = Cache(shutil.copytree(leveled.path, tmp_path / "other.zarr"))
    drop_teacher(leveled, "fake-a@64")
    assert [level.name for level in Cache(leveled.path).teachers.levels("fake-a")] == ["fake-a"]
    drop_teacher(other, "fake-a")
    left = Cache(other.path)
    assert left.teachers.names() == ("fake-a",)
    assert [level.name for level in left.teachers.levels("fake-a")] == ["fake-a@64"]
    assert verify_cache(left, deep=True).ok


def test_a_level_that_cannot_be_read_is_an_error_for_whoever_wants_the_teachers_levels(leveled: Cache) -> None:
    (leveled.path / "teachers/fake-a@64/zarr.json").write_bytes(b"{")
    cache = Cache(leveled.path)
    with pytest.raises(CorruptShardError, match="fake-a@64"):
        cache.teachers.levels("fake-a")
    assert cache.teachers["fake-a"].name == "fake-a"


def test_a_teacher_that_is_not_there_has_no_levels(leveled: Cache) -> None:
    for name in ("sam", "fake-a@64x"):
        with pytest.raises(KeyError, match=name):
            leveled.teachers.levels(name)


def test_another_size_than_the_caches_is_refused_with_how_to_keep_both(build: Build, leveled: Cache) -> None:
    with pytest.raises(StaleCacheError, match="or keep both sizes: --size 32 --size 64"):
        build(teachers={"fake-a": TeacherOptions(size_px=64)})


def test_a_level_is_loaded_again_from_what_the_cache_recorded(leveled: Cache) -> None:
    for level in leveled.teachers.levels("fake-a"):
        again = load_recorded(level.spec).spec
        assert level.spec.software.items() > again.software.items()  # and how its first shards were computed
        assert replace(again, codec=CodecRecord(), software={}) == replace(level.spec, codec=CodecRecord(), software={})


def test_a_group_that_is_not_named_for_its_level_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match="'fake-a@32' does not name a level of fake-a at 64 px"):
        build(teachers={"fake-a@32": LARGE})
