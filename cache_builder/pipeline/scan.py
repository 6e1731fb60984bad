"""The first unit of work: look at every image once. Fills `images/`: status, size and digest, and the
images themselves where the cache keeps them; failures go to the receipt."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cache_builder.pipeline.image_access import ImageAccess
from radio_cache.errors import ImageError, UnreadableImageError
from radio_cache.format.documents import PIXELS
from radio_cache.format.schema import IMAGES_UNIT, Failure, FaultKind, ImageStatus, Receipt
from radio_cache.images.decode import decode_image
from radio_cache.images.stored import chunk_of, encoded_pixels
from radio_cache.prefetch.ordered import ahead
from radio_cache.reader import Cache, digest
from radio_cache.receipts import drop_outdated_receipt, read_receipt
from radio_cache.writer import ShardWriter

MAX_ASPECT = 50
"""Longest side over shortest; a teacher that scales the shorter side up would need gigabytes for a longer strip."""


NO_DIGEST = bytes(16)
"""Of an image that was not read."""


class ScanResult(NamedTuple):
    """What a first look at an image found.

    size_hw: (0, 0) with a reason why it cannot be used. kept: the file for the cache. kind: of the reason, as in `Failure`.
    """

    digest: bytes
    size_hw: tuple[int, int]
    reason: str | None
    kept: bytes = b""
    kind: FaultKind = "image"


def scan_shard(cache: Cache, shard: int, pool: ThreadPoolExecutor, access: ImageAccess | None = None) -> Receipt:
    """Decode every image of a shard once and record what was found. Writes only this shard; twice gives the same bytes."""
    rows, reads = cache.meta.shard_rows(shard), access or ImageAccess(cache)
    return write_scan_results(cache, shard, list(ahead(pool, lambda row: look(reads, row)[0], rows, depth=64)))


def rescan_failures(cache: Cache, failures: Iterable[Failure], pool: ThreadPoolExecutor, access: ImageAccess) -> int:
    """Look again at images that could not be used, and record what changed; return how many can be used now.

    Shards in which nothing changed stay as they are, byte for byte.
    """
    by_shard: dict[int, list[Failure]] = {}
    for failure in failures:
        by_shard.setdefault(failure.row // cache.meta.shard_images, []).append(failure)
    usable = 0
    for shard, own in by_shard.items():
        receipt = read_receipt(cache.storage, IMAGES_UNIT, shard)
        if receipt is None:
            continue  # the scan is going to look at all of them
        before = {failure.row: failure for failure in receipt.failures}
        looks = dict(ahead(pool, lambda one: (one.row, look(access, one.row)[0]), own, depth=64))
        usable += sum(seen.reason is None for seen in looks.values())
        if any(
            (seen.reason, seen.kind) != (before[row].reason, before[row].kind)
            for row, seen in looks.items()
            if row in before
        ):
            rows = cache.meta.shard_rows(shard)[: receipt.num_rows]
            write_scan_results(cache, shard, [looks.get(row) or _recorded(cache, row, before.get(row)) for row in rows])
    return usable


def _recorded(cache: Cache, row: int, failure: Failure | None) -> ScanResult:
    """What an earlier look found."""
    seen = cache.digests[row].tobytes()
    if failure is not None:
        return ScanResult(seen, (0, 0), failure.reason, kind=failure.kind)
    height, width = cache.sizes_hw[row].tolist()
    return ScanResult(seen, (height, width), None, b"" if cache.pixels is None else cache.pixels.file(row))


def write_scan_results(cache: Cache, shard: int, looks: Sequence[ScanResult]) -> Receipt:
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
            failures.append(Failure(row=rows[number], reason=seen.reason, kind=seen.kind))
    drop_outdated_receipt(cache.storage, IMAGES_UNIT, shard, len(looks), [failure.row for failure in failures])
    writer = ShardWriter(cache.storage, IMAGES_UNIT, shard)
    writer.write_plain("status", status, grid=(shard,))
    writer.write_plain("size_hw", size_hw, grid=(shard, 0))
    writer.write_plain("digest", digests, grid=(shard, 0))
    if meta.pixels is not None:
        writer.write_sharded(PIXELS, kept, grid=(shard,), chunks_per_shard=meta.shard_images)
    return writer.commit({"first_row": rows[0], "num_rows": len(looks), "num_tokens": 0, "failures": tuple(failures)})


def look(access: ImageAccess, row: int) -> tuple[ScanResult, Image.Image | None]:
    """What an image is, and the image itself, upright, unless it cannot be used. Raises as `ImageAccess` does for what is no
    fault of one image."""
    cache = access.cache
    try:
        data = access.file(row)
    except ImageError as exc:
        kind: FaultKind = "surroundings" if isinstance(exc, UnreadableImageError) else "image"
        return ScanResult(NO_DIGEST, (0, 0), str(exc), kind=kind), None
    try:
        image = access.decode(row, data, lambda file: decode_image(file, max_pixels=cache.meta.max_pixels))
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise ImageError(f"{image.width} x {image.height} pixels is too long and thin (more than {MAX_ASPECT} : 1)")
    except UnreadableImageError as exc:
        return ScanResult(digest(data), (0, 0), str(exc), kind="surroundings"), None
    except ImageError as exc:
        return ScanResult(digest(data), (0, 0), str(exc)), None
    store = cache.meta.pixels
    kept = access.with_memory(row, lambda: encoded_pixels(image, data, store)) if store else b""
    return ScanResult(digest(data), (image.height, image.width), None, kept), image
