"""Is a cache right? Damage of every kind is found, named and mended, and nothing else is touched."""

import contextlib
import errno
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from radio_cache.checks.verify import drop_teacher, repair_cache, verify_cache
from radio_cache.errors import StoreError
from radio_cache.reader import Cache
from radio_cache.testing import make_tiny_cache, write_images


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    write_images(folder / "photos", per_class=5)
    make_tiny_cache(folder / "c.zarr", folder / "photos", unusable=["blue/1.png"])
    return folder / "c.zarr"


@pytest.fixture
def cache_path(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "c.zarr"))


SHARD = "teachers/fake-a/spatial/c/0/1/0/0/0"


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_a_cache_that_is_right_passes(cache_path: Path) -> None:
    report = verify_cache(Cache(cache_path), deep=True)
    assert report.damages == ()
    assert report.shards == {"images": 3, "fake-a": 3, "fake-b": 3}
    assert set(report.missing.values()) == {0}


def test_a_shard_not_built_yet_is_missing_not_damaged(cache_path: Path) -> None:
    (cache_path / "receipts/fake-a/000001.json").unlink()
    report = verify_cache(Cache(cache_path))
    assert report.ok
    assert report.missing["fake-a"] == 1


@pytest.mark.parametrize(
    ("damage", "place", "what"),
    [
        (lambda p: flip(p / SHARD, 10), SHARD, "checksum"),
        (lambda p: flip(p / SHARD, -10), SHARD, "checksum"),
        (lambda p: flip(p / SHARD, -1), SHARD, "checksum"),
        (lambda p: (p / SHARD).write_bytes((p / SHARD).read_bytes()[:-100]), SHARD, "bytes long"),
        (lambda p: (p / SHARD).write_bytes(b""), SHARD, "0 bytes long"),
        (lambda p: (p / SHARD).unlink(), SHARD, "gone"),
        (lambda p: shutil.copy(p / SHARD.replace("/1/", "/0/"), p / SHARD), SHARD, "bytes long"),
        (lambda p: shutil.copy(p / SHARD.replace("fake-a", "fake-b"), p / SHARD), SHARD, "bytes long"),
        (
            lambda p: (p / "teachers/fake-a/stats/spatial/c/1/0/0").unlink(),
            "teachers/fake-a/stats/spatial/c/1/0/0",
            "gone",
        ),
        (lambda p: flip(p / "teachers/fake-a/summary/c/0/1/0", -2), "teachers/fake-a/summary/c/0/1/0", "checksum"),
        (lambda p: flip(p / "images/status/c/1", 0), "images/status/c/1", "checksum"),
        (
            lambda p: shutil.copy(p / "receipts/fake-a/000000.json", p / "receipts/fake-a/000001.json"),
            "receipts/fake-a/000001.json",
            "another shard",
        ),
        (lambda p: (p / "receipts/fake-a/000001.json").write_text("{}"), "receipts/fake-a/000001.json", "damaged"),
        (
            lambda p: (p / "receipts/fake-a/000001.json").write_bytes(b"\xff\x00"),
            "receipts/fake-a/000001.json",
            "damaged",
        ),
    ],
)
def test_damage_of_one_shard_is_named_and_only_that_shard_is_dropped(
    cache_path: Path, damage: object, place: str, what: str
) -> None:
    damage(cache_path)  # type: ignore[operator]
    cache = Cache(cache_path)
    report = verify_cache(cache)
    assert [(found.place, found.mendable) for found in report.damages] == [(place, True)]
    assert what in report.damages[0].what
    before = {file for file in cache_path.rglob("*") if file.is_file()}
    repair_cache(cache, report)
    gone = before - {file for file in cache_path.rglob("*") if file.is_file()}
    assert [file.name for file in gone] == ["000001.json"]
    again = verify_cache(Cache(cache_path))
    assert again.ok
    assert sum(again.missing.values()) == 1


@given(position=st.integers(0, 10**9), bit=st.integers(0, 7))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_flipped_bit_of_a_receipt_is_found(cache_path: Path, position: int, bit: int) -> None:
    receipt = cache_path / "receipts/fake-b/000001.json"
    good = receipt.read_bytes()
    try:
        flip(receipt, position % len(good), bit)
        changed = True
        with contextlib.suppress(ValueError):
            changed = json.loads(receipt.read_bytes()) != json.loads(good)
        assert verify_cache(Cache(cache_path)).ok is not changed
    finally:
        receipt.write_bytes(good)


def test_metadata_that_was_edited_is_written_again(cache_path: Path) -> None:
    document = cache_path / "teachers/fake-a/spatial/zarr.json"
    good = document.read_bytes()
    document.write_bytes(good.replace(b'"float16"', b'"float32"'))
    cache = Cache(cache_path)
    report = verify_cache(cache)
    assert [(found.place, found.shard) for found in report.damages] == [("teachers/fake-a/spatial/zarr.json", None)]
    repair_cache(cache, report)
    assert json.loads(document.read_bytes()) == json.loads(good)
    assert verify_cache(Cache(cache_path), deep=True).ok


def test_an_image_index_that_cannot_be_read_is_named_and_left(cache_path: Path) -> None:
    flip(cache_path / Cache(cache_path).meta.index / "key_bytes/c/0", 3)
    cache = Cache(cache_path)
    report = verify_cache(cache)
    assert not report.ok
    assert not report.damages[0].mendable
    assert "restore images/" in repair_cache(cache, report)[0]


def test_only_deep_sees_a_map_that_is_a_hole_though_its_image_is_fine(cache_path: Path) -> None:
    receipt = cache_path / "receipts/fake-a/000000.json"
    data = json.loads(receipt.read_bytes())
    assert data.pop("failures")
    data.pop("crc32c")
    receipt.write_text(json.dumps(data | {"failures": []}))
    assert verify_cache(Cache(cache_path)).ok
    assert [damage.shard for damage in verify_cache(Cache(cache_path), deep=True).damages] == [0]


def test_a_dropped_teacher_is_gone_and_the_other_is_untouched(cache_path: Path) -> None:
    before = Cache(cache_path).teachers["fake-b"].codes([0, 5])
    freed = drop_teacher(Cache(cache_path), "fake-a")
    assert freed > 1000
    cache = Cache(cache_path)
    assert list(cache.teachers) == ["fake-b"]
    assert not (cache_path / "receipts/fake-a").exists()
    np.testing.assert_array_equal(cache.teachers["fake-b"].codes([0, 5]), before)
    assert verify_cache(cache, deep=True).ok
    with pytest.raises(StoreError, match="fake-b"):
        drop_teacher(cache, "fake-a")


@contextmanager
def refused(part: str, number: int) -> Iterator[None]:
    """The system refuses to open files with this in their path; the tests run as root, whom no permission stops."""
    original = io.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
        if part in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return original(path, *arguments, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(io, "open", refuse)
        yield


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE])
@pytest.mark.parametrize("part", ["/spatial/c/", "/summary/c/", "/images/status/c/", "/spatial/zarr.json"])
def test_what_cannot_be_read_just_now_is_no_damage_and_repair_leaves_it(
    cache_path: Path, number: int, part: str
) -> None:
    cache = Cache(cache_path)
    before = {path: path.read_bytes() for path in cache_path.rglob("*") if path.is_file()}
    with refused(part, number):
        report = verify_cache(cache, deep=True)
        assert not report.ok
        assert all(damage.is_unread and not damage.mendable for damage in report.damages)
        assert os.strerror(number) in report.damages[0].what
        assert all(line.startswith("not read, and left alone: ") for line in repair_cache(cache, report))
    assert {path: path.read_bytes() for path in cache_path.rglob("*") if path.is_file()} == before
    assert verify_cache(Cache(cache_path), deep=True).ok


def test_a_teacher_that_cannot_be_read_just_now_is_not_to_be_dropped(cache_path: Path) -> None:
    name = next(iter(Cache(cache_path).teachers))
    with refused(f"teachers/{name}/zarr.json", errno.EACCES):
        cache = Cache(cache_path)
        report = verify_cache(cache)
    assert any(damage.unit == name and damage.is_unread for damage in report.damages)
    assert not any("drop" in damage.what for damage in report.damages)
