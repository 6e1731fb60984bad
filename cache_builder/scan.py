"""The first unit of work: look at every image once. Fills `images/`: status, size and digest, and the
images themselves where the cache keeps them; failures go to the receipt."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from radio_cache.errors import ImageError
from radio_cache.images import decode_image
from radio_cache.layout import PIXELS
from radio_cache.prefetch import ahead
from radio_cache.reader import Cache, digest
from radio_cache.receipts import drop_short_receipt
from radio_cache.schema import IMAGES_UNIT, Failure, ImageStatus, Receipt
from radio_cache.stored_pixels import chunk_of, encoded_pixels
from radio_cache.writer import ShardWriter

MAX_ASPECT = 50
"""Longest side over shortest; a teacher that scales the shorter side up would need gigabytes for a longer strip."""


class Look(NamedTuple):
    """What a first look at an image found. size_hw: (0, 0) with a reason why it cannot be used; kept: the file for the cache."""

    digest: bytes
    size_hw: tuple[int, int]
    reason: str | None
    kept: bytes = b""


def scan_shard(cache: Cache, shard: int, pool: ThreadPoolExecutor) -> Receipt:
    """Decode every image of a shard once and record what was found. Writes only this shard; twice gives the same bytes."""
    rows = cache.meta.shard_rows(shard)
    return write_looks(cache, shard, list(ahead(pool, lambda row: look(cache, row)[0], rows, depth=64)))


def write_looks(cache: Cache, shard: int, looks: Sequence[Look]) -> Receipt:
    """Record what was found of every image of a shard.

    An image that cannot be used gets status UNUSABLE and a reason; it never stops the build.
    """
    meta, rows = cache.meta, cache.meta.shard_rows(shard)
    status = np.zeros(meta.shard_images, np.uint8)
    size_hw = np.zeros((meta.shard_images, 2), np.int32)
    digests = np.zeros((meta.shard_images, 16), np.uint8)
    failures: list[Failure] = []
    kept: list[NDArray[np.uint8] | None] = []
    for number, seen in enumerate(looks):
        status[number] = ImageStatus.OK if seen.reason is None else ImageStatus.UNUSABLE
        size_hw[number] = seen.size_hw
        digests[number] = np.frombuffer(seen.digest, np.uint8)
        kept.append(chunk_of(seen.kept) if seen.kept else None)
        if seen.reason is not None:
            failures.append(Failure(row=rows[number], reason=seen.reason))
    drop_short_receipt(cache.storage, IMAGES_UNIT, shard, len(rows))
    writer = ShardWriter(cache.storage, IMAGES_UNIT, shard)
    writer.write_plain("status", status, grid=(shard,))
    writer.write_plain("size_hw", size_hw, grid=(shard, 0))
    writer.write_plain("digest", digests, grid=(shard, 0))
    if meta.pixels is not None:
        writer.write_sharded(PIXELS, kept, grid=(shard,), chunks_per_shard=meta.shard_images)
    return writer.commit({"first_row": rows[0], "num_rows": len(rows), "num_tokens": 0, "failures": tuple(failures)})


def look(cache: Cache, row: int) -> tuple[Look, Image.Image | None]:
    """What an image is, and the image itself, upright, unless it cannot be used."""
    data = b""
    try:
        data = cache.read_unchecked(row)
        image = decode_image(data, max_pixels=cache.meta.max_pixels)
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise ImageError(f"{image.width} x {image.height} pixels is too long and thin (more than {MAX_ASPECT} : 1)")
    except ImageError as exc:
        return Look(digest(data), (0, 0), str(exc)), None
    store = cache.meta.pixels
    kept = encoded_pixels(image, data, store) if store else b""
    return Look(digest(data), (image.height, image.width), None, kept), image
