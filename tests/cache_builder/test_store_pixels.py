"""Images kept in the cache: training needs no other file, and teachers are shown the originals all the same."""

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from PIL import Image

from cache_builder.build import BuildReport
from cache_builder.commands.build_options import view_sampling
from cache_builder.copying import CopyConfig, copy_cache
from cache_builder.sources.listing_record import LISTING_FILE as LISTING
from cache_builder.teachers import TeacherOptions
from radio_cache import Cache
from radio_cache.checks.verify import repair_cache, verify_cache
from radio_cache.codecs.calibrate import CodecRequest
from radio_cache.errors import ConfigError, CorruptShardError, ImageError, StaleCacheError
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.pixels import PixelFormat, PixelStore
from radio_cache.images.decode import decode_image
from radio_cache.images.stored import encoded_pixels
from radio_cache.storage.base import Storage

Build = Callable[..., BuildReport]

LOSSLESS = PixelStore(side_px=24, format="webp-lossless", quality=0)
JPEG = PixelStore(side_px=24, format="jpeg", quality=90)
SHARD = "images/pixels/c/1"


@pytest.fixture
def photos(tmp_path: Path, ten_images: Path) -> Path:
    folder = Path(shutil.copytree(ten_images, tmp_path / "photos"))
    (folder / "ant/1.png").write_bytes(b"")
    return folder


@pytest.fixture
def kept(build: Build, photos: Path) -> Cache:
    """Ten images, row 1 unusable, shorter side at most 24."""
    return build(images=(str(photos),), pixels=LOSSLESS).cache


def test_kept_images_are_read_without_the_originals(kept: Cache, photos: Path) -> None:
    originals = {row: Image.open(photos / kept.index.key(row)).convert("RGB") for row in range(10) if row != 1}
    shutil.rmtree(photos)
    cache = pickle.loads(pickle.dumps(Cache(kept.path)))
    for row, original in originals.items():
        found = decode_image(cache.read_pixels(row))
        scale = min(1, 24 / min(original.size))
        size = (round(original.width * scale), round(original.height * scale))
        assert found.size == size
        shrunk = original if scale == 1 else original.resize(size, Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(shrunk))
    with pytest.raises(ImageError, match="No such file"):
        cache.read_file(0)


def test_features_are_those_of_the_originals(build: Build, kept: Cache, photos: Path, tmp_path: Path) -> None:
    plain = build(images=(str(photos),), out=tmp_path / "plain.zarr").cache
    rows = plain.usable_rows(["fake-a"])
    assert 1 not in rows
    for name, teacher in plain.teachers.items():
        np.testing.assert_array_equal(teacher.codes(rows), kept.teachers[name].codes(rows))
    np.testing.assert_array_equal(plain.digests, kept.digests)
    np.testing.assert_array_equal(plain.sizes_hw, kept.sizes_hw)
    assert plain.read_pixels(3) == plain.read_file(3) == (photos / plain.index.key(3)).read_bytes()


@pytest.mark.parametrize("first_look", ["with the teacher", "before it"])
def test_a_bucket_holds_the_same_kept_images_levels_and_views_as_a_folder(
    build: Build, photos: Path, tmp_path: Path, bucket: Callable[[str], str], first_look: str
) -> None:
    sampling = view_sampling(flipped=True)
    codec = CodecRecord.of_request(CodecRequest(name="half") if first_look == "with the teacher" else None)
    whole = TeacherOptions(codec=codec, views=2, view_sampling=sampling)
    fields = {
        "images": (str(photos),),
        "pixels": LOSSLESS,
        "teachers": {"fake-a": whole, "fake-a@64": replace(whole, size_px=64, level_of="fake-a")},
    }
    here = build(**fields).cache
    there = build(**fields, out=bucket("cache.zarr")).cache
    assert contents(there.storage) == contents(here.storage)
    assert there.read_pixels(3) == here.read_pixels(3)
    again = build(**fields, out=there.url)
    assert [result.images for result in again.results] == [0, 0]


def contents(storage: Storage) -> dict[str, bytes]:
    """Every file of a cache, but for the note of when its sources were changed last."""
    return {path: storage.read(path) for path, _ in storage.list_files() if path != LISTING}


def test_zarr_reads_the_same_files(kept: Cache) -> None:
    array: Any = zarr.open_array(kept.path / "images/pixels", mode="r")
    found = array[:].tolist()
    assert [found[row] for row in (0, 5, 9)] == [kept.read_pixels(row) for row in (0, 5, 9)]
    assert found[1] == b""


def test_an_unusable_image_is_a_hole(kept: Cache) -> None:
    with pytest.raises(ImageError, match=r"its pixels are not kept: .*images/pixels/c/0: row 1 is a hole"):
        kept.read_pixels(1)


@pytest.mark.parametrize("place", [20, -6, -30])
def test_a_damaged_image_is_found_and_mended_by_a_build(build: Build, kept: Cache, photos: Path, place: int) -> None:
    path = kept.path / SHARD
    before = path.read_bytes()
    data = bytearray(before)
    data[place] ^= 1
    path.write_bytes(data)
    broken = Cache(kept.path)
    with pytest.raises(CorruptShardError, match="images/pixels/c/1"):
        list(map(broken.read_pixels, (3, 4, 5)))
    report = verify_cache(broken)
    assert [(damage.unit, damage.shard, damage.place) for damage in report.damages] == [("images", 1, SHARD)]
    repair_cache(broken, report)
    build(images=(str(photos),), pixels=LOSSLESS)
    assert path.read_bytes() == before


def test_a_deleted_shard_of_images_says_what_is_gone(kept: Cache) -> None:
    (kept.path / SHARD).unlink()
    with pytest.raises(ImageError, match=r"images/pixels/c/1 is not there: radio-cache repair"):
        Cache(kept.path).read_pixels(4)


def test_images_grow_with_the_cache(build: Build, kept: Cache, photos: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"images": (str(photos),), "pixels": LOSSLESS, "out": tmp_path / "grown.zarr"}
    build(**arguments, limit=7)
    grown = build(**arguments).cache
    assert [grown.read_pixels(row) for row in (0, 6, 9)] == [kept.read_pixels(row) for row in (0, 6, 9)]
    assert verify_cache(grown, deep=True).ok


def test_a_copy_of_some_images_has_their_pixels(kept: Cache, tmp_path: Path) -> None:
    copy_cache(CopyConfig(source=kept.path, target=tmp_path / "whole.zarr"))
    copy_cache(CopyConfig(source=kept.path, target=tmp_path / "five.zarr", limit=5))
    for name, rows in (("whole.zarr", (0, 5, 9)), ("five.zarr", (0, 2, 4))):
        copied = Cache(tmp_path / name)
        assert [copied.read_pixels(row) for row in rows] == [kept.read_pixels(row) for row in rows]
        assert verify_cache(copied, deep=True).ok


def test_a_cache_keeps_images_from_the_start_and_in_one_way(
    build: Build, kept: Cache, photos: Path, tmp_path: Path
) -> None:
    build(images=(str(photos),))  # whoever does not ask takes what is there
    with pytest.raises(
        StaleCacheError, match=r"--store-pixels 24 as webp-lossless, this run asks for 24 as jpeg of quality 90"
    ):
        build(images=(str(photos),), pixels=JPEG)
    build(images=(str(photos),), out=tmp_path / "plain.zarr")
    with pytest.raises(StaleCacheError, match="--store-pixels nothing, this run asks for 24 as jpeg"):
        build(images=(str(photos),), out=tmp_path / "plain.zarr", pixels=JPEG)


def test_a_small_file_is_kept_as_it_is(ten_images: Path) -> None:
    small, large = ten_images / "ant/0.png", ten_images / "bee/photo0.png"
    for path in (small, large):
        image, data = Image.open(path).convert("RGB"), path.read_bytes()
        tight = encoded_pixels(image, data, JPEG)
        assert tight != data
        assert min(decode_image(tight).size) == 24
    image, data = Image.open(small).convert("RGB"), small.read_bytes()
    roomy = PixelStore(side_px=100, format="webp-lossless", quality=0)
    padded = encoded_pixels(image, data + b"\0" * 10**6, roomy)
    assert len(padded) < 10**6
    jpeg = encoded_pixels(image, padded, PixelStore(side_px=100, format="jpeg", quality=100))
    assert jpeg == padded or len(jpeg) < len(padded)


def test_a_strip_too_long_for_the_format_is_kept_without_loss() -> None:
    strip = Image.new("RGB", (17_000, 30), (1, 2, 3))
    found = decode_image(encoded_pixels(strip, b"x" * 10**7, PixelStore(side_px=64, format="webp-lossless", quality=0)))
    assert found.size == strip.size


@pytest.mark.parametrize(
    ("side_px", "kind", "quality"), [(0, "jpeg", 90), (10**6, "jpeg", 90), (64, "jpeg", 0), (64, "webp-lossless", 90)]
)
def test_impossible_ways_to_keep_images_are_refused(side_px: int, kind: PixelFormat, quality: int) -> None:
    with pytest.raises(ConfigError, match=r"--store-pixels|no quality"):
        PixelStore(side_px=side_px, format=kind, quality=quality)
