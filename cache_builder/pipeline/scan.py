"""The scan: every image is read and decoded once, before or during the first teacher's pass.

It fills `images/` with status, size and digest, and with the images themselves if the cache stores pixels. Failures go to the
receipt.
"""

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
from radio_cache.prefetch.ordered import prefetch_map
from radio_cache.reader import Cache, digest
from radio_cache.receipts import drop_outdated_receipt, read_receipt
from radio_cache.writer import ShardWriter

MAX_ASPECT = 50
"""Longest side over shortest. A teacher that scales the shorter side up would need gigabytes for a longer strip."""

NO_DIGEST = bytes(16)
"""Digest of an image that was not read."""

_DEPTH = 64
"""Images decoded ahead."""


class ScanResult(NamedTuple):
    """Result of scanning one image.

    Attributes:
        digest: of the file.
        size_hw: height and width in pixels, upright; (0, 0) if the image cannot be used.
        reason: why it cannot be used; None if it can.
        stored_file: the file to store in the cache, empty without `--store-pixels`.
        kind: kind of the reason, as in `Failure`.
    """

    digest: bytes
    size_hw: tuple[int, int]
    reason: str | None
    stored_file: bytes = b""
    kind: FaultKind = "image"


def scan_shard(cache: Cache, shard: int, pool: ThreadPoolExecutor, access: ImageAccess | None = None) -> Receipt:
    """Decode every image of a shard once and write the results. Writes only this shard, and the same bytes each time."""
    rows, reads = cache.meta.shard_rows(shard), access or ImageAccess(cache)
    return write_scan_results(
        cache, shard, list(prefetch_map(pool, lambda row: scan_image(reads, row)[0], rows, depth=_DEPTH))
    )


def rescan_failures(cache: Cache, failures: Iterable[Failure], pool: ThreadPoolExecutor, access: ImageAccess) -> int:
    """Scan images again that could not be used, write what changed, and return how many can be used now.

    Shards in which nothing changed stay as they are, byte for byte.
    """
    by_shard: dict[int, list[Failure]] = {}
    for failure in failures:
        by_shard.setdefault(failure.row // cache.meta.shard_images, []).append(failure)
    num_usable = 0
    for shard, shard_failures in by_shard.items():
        receipt = read_receipt(cache.storage, IMAGES_UNIT, shard)
        # The shard was never scanned, or its receipt was dropped by a repair.
        if receipt is None:
            continue  # the scan reads all images of this shard anyway
        before = {failure.row: failure for failure in receipt.failures}

        def rescan(failure: Failure) -> tuple[int, ScanResult]:
            return failure.row, scan_image(access, failure.row)[0]

        results = dict(prefetch_map(pool, rescan, shard_failures, depth=_DEPTH))
        num_usable += sum(result.reason is None for result in results.values())
        if any(
            (result.reason, result.kind) != (before[row].reason, before[row].kind)
            for row, result in results.items()
            if row in before
        ):
            rows = cache.meta.shard_rows(shard)[: receipt.num_rows]
            write_scan_results(
                cache, shard, [results.get(row) or _recorded_result(cache, row, before.get(row)) for row in rows]
            )
    return num_usable


def _recorded_result(cache: Cache, row: int, failure: Failure | None) -> ScanResult:
    """Return the result of an earlier scan."""
    recorded_digest = cache.digests[row].tobytes()
    if failure is not None:
        return ScanResult(recorded_digest, (0, 0), failure.reason, kind=failure.kind)
    height, width = cache.sizes_hw[row].tolist()
    return ScanResult(recorded_digest, (height, width), None, b"" if cache.pixels is None else cache.pixels.file(row))


def write_scan_results(cache: Cache, shard: int, results: Sequence[ScanResult]) -> Receipt:
    """Write the results of every image of a shard.

    An image that cannot be used gets status UNUSABLE and a reason. It never stops the build.
    """
    meta, rows = cache.meta, cache.meta.shard_rows(shard)
    # Full-size chunks, also for the last shard, which may be shorter.
    status = np.zeros(meta.shard_images, np.uint8)
    size_hw = np.zeros((meta.shard_images, 2), np.int32)
    digests = np.zeros((meta.shard_images, 16), np.uint8)
    failures: list[Failure] = []
    stored_files: list[NDArray[np.uint8] | None] = []
    for number, result in enumerate(results):
        status[number] = ImageStatus.OK if result.reason is None else ImageStatus.UNUSABLE
        size_hw[number] = result.size_hw
        digests[number] = np.frombuffer(result.digest, np.uint8)
        stored_files.append(chunk_of(result.stored_file) if result.stored_file else None)
        if result.reason is not None:
            failures.append(Failure(row=rows[number], reason=result.reason, kind=result.kind))
    # Before the files change: a receipt must never vouch for half-written ones.
    drop_outdated_receipt(cache.storage, IMAGES_UNIT, shard, len(results), [failure.row for failure in failures])
    writer = ShardWriter(cache.storage, IMAGES_UNIT, shard)
    writer.write_plain("status", status, grid=(shard,))
    writer.write_plain("size_hw", size_hw, grid=(shard, 0))
    writer.write_plain("digest", digests, grid=(shard, 0))
    if meta.pixels is not None:
        writer.write_sharded(PIXELS, stored_files, grid=(shard,), chunks_per_shard=meta.shard_images)
    return writer.commit({"first_row": rows[0], "num_rows": len(results), "num_tokens": 0, "failures": tuple(failures)})


def scan_image(access: ImageAccess, row: int) -> tuple[ScanResult, Image.Image | None]:
    """Read and decode one image. Return its result, and the image itself, upright, or None if it cannot be used.

    Raises:
        SourceError: as `ImageAccess` does, for faults that are not of one image.
    """
    cache = access.cache
    try:
        data = access.file(row)
    except ImageError as exc:
        # A file that cannot be read now may be fine later, and is scanned again.
        kind: FaultKind = "surroundings" if isinstance(exc, UnreadableImageError) else "image"
        return ScanResult(NO_DIGEST, (0, 0), str(exc), kind=kind), None
    try:
        image = access.decode(row, data, lambda file: decode_image(file, max_pixels=cache.meta.max_pixels))
        # Before any teacher sees it: a strip would take gigabytes once it is resized.
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise ImageError(f"{image.width} x {image.height} pixels is too long and thin (more than {MAX_ASPECT} : 1)")
    except UnreadableImageError as exc:
        return ScanResult(digest(data), (0, 0), str(exc), kind="surroundings"), None
    except ImageError as exc:
        return ScanResult(digest(data), (0, 0), str(exc)), None
    store = cache.meta.pixels
    # Encoded while the decoded image is at hand.
    stored_file = access.with_memory(row, lambda: encoded_pixels(image, data, store)) if store else b""
    return ScanResult(digest(data), (image.height, image.width), None, stored_file), image
