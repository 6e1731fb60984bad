"""The first look at every image: status, upright size and digest."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from cache_builder.pipeline.scan import scan_shard
from cache_builder.sources import list_images
from radio_cache import Cache, CacheMeta
from radio_cache.format.schema import ImageStatus
from radio_cache.reader import digest
from radio_cache.writer import create_cache


def unseen_cache(path: Path, images: Path) -> Cache:
    listing = list_images([str(images)])
    meta = CacheMeta(
        num_images=len(listing.index.keys),
        shard_images=3,
        creator="test",
        containers=listing.containers,
        class_names=listing.class_names,
        max_pixels=10_000,
    )
    create_cache(path, meta, listing.index)
    return Cache(path)


def test_sizes_are_upright_digests_are_the_files_and_failures_have_reasons(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.new("RGB", (40, 20)).save(photos / "a.jpg", exif=exif)
    Image.new("L", (30, 10)).save(photos / "b.png")
    Image.new("L", (200, 100)).save(photos / "c.png")  # more pixels than max_pixels
    (photos / "d.png").write_bytes(b"")
    cache = unseen_cache(tmp_path / "c.zarr", photos)
    assert cache.usable_rows().tolist() == []
    with ThreadPoolExecutor(2) as pool:
        receipts = [scan_shard(cache, shard, pool) for shard in range(2)]
        files = {file: file.read_bytes() for file in cache.path.rglob("*") if file.is_file()}
        assert [scan_shard(cache, shard, pool) for shard in range(2)] == receipts
    assert {file: file.read_bytes() for file in cache.path.rglob("*") if file.is_file()} == files

    cache = Cache(cache.path)
    assert cache.sizes_hw.tolist() == [[40, 20], [10, 30], [0, 0], [0, 0]]
    assert cache.usable_rows().tolist() == [0, 1]
    assert [(failure.row, failure.reason.split(";")[0]) for failure in cache.failures()] == [
        (2, "200 x 100 pixels is more than the limit of 10000"),
        (3, "the file is empty (0 bytes)"),
    ]
    for row, name in enumerate("abcd"):
        (file,) = photos.glob(f"{name}.*")
        assert cache.digests[row].tobytes() == digest(file.read_bytes())
    assert np.array_equal(cache.files.column("status"), [ImageStatus.OK] * 2 + [ImageStatus.UNUSABLE] * 2)
