"""The unit of work: one shard of one teacher, computed, encoded and committed.

`run_shards` overlaps many of them. While the device computes, threads read, decode and resize the next images, and another
thread compresses and writes the last shard. The images in flight are as many as the device and the threads need, plus the
codes of two shards. Batches are cut within a shard, in row order, so the stored bytes depend neither on the number of threads
nor on what an earlier run had finished.

The images of a shard that was not scanned yet are decoded once, for the scan and for the teacher.
"""

import contextlib
import itertools
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from cache_builder.build_config import BuildConfig
from cache_builder.pipeline.batching import ShardImages
from cache_builder.pipeline.device import CodeBatch, DeviceWork, device_streams
from cache_builder.pipeline.events import IGNORED_EVENTS, BuildEvents
from cache_builder.pipeline.image_access import ImageAccess
from cache_builder.pipeline.scan import write_scan_results
from cache_builder.pipeline.timing import DeviceWait, StageSeconds, Stopwatch
from cache_builder.pipeline.views import TeacherView, view_loader
from cache_builder.teachers.base import Teacher
from radio_cache.codecs import Half
from radio_cache.errors import StaleCacheError, UnstorableFeaturesError
from radio_cache.format.schema import IMAGES_UNIT, Failure, Receipt, TeacherSpec, unit_group
from radio_cache.format.zarr_json import DOCUMENT
from radio_cache.geometry.views import View
from radio_cache.prefetch.ordered import prefetch_map
from radio_cache.reader import Cache
from radio_cache.receipts import drop_outdated_receipt, drop_receipt, is_finished, read_receipt, unfinished_shards
from radio_cache.statistics.fidelity import PERFECT, Fidelity, fidelity_from_cosines
from radio_cache.statistics.moments import power_sums
from radio_cache.writer import ShardWriter


def run_shards(
    cache: Cache,
    teacher: Teacher,
    shards: Iterable[int],
    config: BuildConfig,
    pool: ThreadPoolExecutor,
    stages: StageSeconds,
    events: BuildEvents = IGNORED_EVENTS,
    access: ImageAccess | None = None,
) -> Generator[Receipt]:
    """Compute and commit shards of a teacher, and yield the receipt of each when it is on disk.

    Closed early, it finishes the shard that is being written and abandons those that are being computed.

    Args:
        cache: a cache in which the teacher is registered.
        teacher: the teacher, which is on the device.
        shards: no two alike; the next one is taken when all images of those before are being decoded.
        config: device, batch size and threads.
        pool: threads that read and decode.
        stages: seconds by stage, which the work adds to.
        events: receives `progress` per batch, `scanned` and `committed` per shard.
        access: reads the images; None for a new one.
    """
    meta, spec, device = cache.meta, teacher.spec, torch.device(config.device)
    # Compared after each write: another process may drop the teacher meanwhile.
    document = _teacher_document(cache, spec.name)
    # A lookup by row: `usable_rows` is a list of numbers, and every shard asks for its rows.
    is_usable = np.zeros(cache.num_images, np.bool_)
    is_usable[cache.usable_rows()] = True
    # Images of these shards are scanned on the way, so that they are decoded once.
    unscanned = set(unfinished_shards(cache.receipt_columns(IMAGES_UNIT), meta.shard_rows, meta.num_shards))
    # Three stages take the same shards, each at its own time.
    to_decode, to_compute, to_write = itertools.tee(shards, 3)
    in_flight: dict[int, ShardImages] = {}
    is_last_batch: deque[bool] = deque()  # of the batches on the device, in order

    def rows_of(shard: int) -> list[int]:
        return [row for row in meta.shard_rows(shard) if is_usable[row] or shard in unscanned]

    work = DeviceWork(teacher, device, stages, codec=cache.teachers[spec.name].codec, events=events)
    with contextlib.ExitStack() as stack:
        # One writer: shards are committed in order, and the disk is not shared by two.
        writer = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="write"))
        num_streams = stack.enter_context(device_streams(device))
        streams = stack.enter_context(ThreadPoolExecutor(num_streams, thread_name_prefix="device"))
        # Enough for the batches on the device, one being cut, and one image for each thread that decodes.
        depth = (num_streams + 2) * -(-config.batch_images // spec.views) + config.threads
        # Lazy: the next shard is only taken when its images are about to be decoded.
        requests = ((row, tuple(range(spec.views))) for shard in to_decode for row in rows_of(shard))
        reads = access or ImageAccess(cache, leave_out=config.leave_out_unreadable)
        loaded = prefetch_map(pool, view_loader(cache, reads, spec, unscanned, stages), requests, depth=depth)
        # Cancels images that wait to be decoded, if the build stops.
        stack.callback(loaded.close)

        def batches() -> Generator[list[TeacherView]]:
            for shard in to_compute:
                # Filled here as images come, and read by the loop below once the shard is complete.
                images = in_flight.setdefault(shard, ShardImages())
                for batch in images.batches(loaded, len(rows_of(shard)), config.batch_images, stages):
                    is_last_batch.append(batch.is_last)
                    yield batch.views

        encoded = prefetch_map(streams, work.codes, batches(), depth=num_streams + 1)
        stack.callback(encoded.close)
        written: Future[Receipt] | None = None
        for shard in to_write:
            features = ShardFeatures(cache, spec, shard)
            is_last = False
            while not is_last:
                try:
                    with DeviceWait(stages):
                        code_batches = next(encoded)
                except UnstorableFeaturesError as exc:
                    raise unstorable_image_error(cache, spec, exc) from exc
                for code_batch in code_batches:
                    events.progress(features.add(code_batch))
                is_last = is_last_batch.popleft()
            images = in_flight.pop(shard)
            # Unusable images count as done: the line has to reach the number of all images.
            events.progress(len(meta.shard_rows(shard)) - len(images.rows))
            # One shard is written at a time, so that two shards' codes at most are in memory.
            if written is not None:
                with Stopwatch(stages, "wait_write"):
                    receipt = written.result()
                yield receipt
            written = writer.submit(write_shard, cache, spec, shard, images, features, pool, stages, document, events)
        if written is not None:
            with Stopwatch(stages, "wait_write"):
                receipt = written.result()
            yield receipt


def unstorable_image_error(cache: Cache, spec: TeacherSpec, error: UnstorableFeaturesError) -> UnstorableFeaturesError:
    """Return the error with the cache, the teacher, the image and the cure."""
    key = cache.index.key(error.row)
    return UnstorableFeaturesError(
        error.row,
        f"{cache.url}, teacher '{spec.name}', image {key}: {error}. If this image alone is at fault, leave it out of a new "
        f"cache: --filter '!{key}'",
    )


@final
class ShardFeatures:
    """Features of one shard's usable rows, in row order, added batch by batch.

    Only codes are kept, so that full-precision maps never pile up.

    Attributes:
        sums: (2, c), sum and sum of squares over all tokens.
        squared_errors: summed over all tokens.
    """

    def __init__(self, cache: Cache, spec: TeacherSpec, shard: int) -> None:
        cached = cache.teachers[spec.name]
        # Allocated once at full size: the number of usable images is not known before all are decoded.
        max_views = len(cache.meta.shard_rows(shard)) * spec.views
        self._views_per_image, self._num_views = spec.views, 0
        self._codes = np.empty((max_views, *cached.row_shape), cached.codec.dtype)
        self._summary = None if spec.summary_dim is None else np.empty((max_views, spec.summary_dim), np.float32)
        self._cosines = [np.zeros(0, np.float32)]
        self.sums, self.squared_errors = np.zeros((2, spec.spatial_dim)), 0.0

    def add(self, batch: CodeBatch) -> int:
        """Add the next views, and return the number of images that are complete with them."""
        first, end = self._num_views, self._num_views + len(batch.codes)
        self._codes[first:end] = batch.codes
        if self._summary is not None and batch.summary is not None:
            self._summary[first:end] = batch.summary
        # One view at a time, in order: the sum must not depend on how batches were cut.
        for view_sums, error in zip(batch.sums, batch.squared_errors, strict=True):
            self.sums += view_sums
            self.squared_errors += float(error)
        self._cosines.append(batch.cosines)
        self._num_views = end
        return end // self._views_per_image - first // self._views_per_image

    @property
    def codes(self) -> NDArray[Any]:
        """Codes (n, views, *row_shape)."""
        return self._by_image(self._codes)

    @property
    def summary(self) -> NDArray[np.float32] | None:
        """Summaries (n, views, c), or None."""
        return None if self._summary is None else self._by_image(self._summary)

    @property
    def cosines(self) -> NDArray[np.float32]:
        """Cosines of decoded and true tokens, of all tokens."""
        return np.concatenate(self._cosines)

    def _by_image(self, by_view: NDArray[Any]) -> NDArray[Any]:
        # (max_views, ...) -> (n, views, ...)
        num_images = self._num_views // self._views_per_image
        return by_view[: self._num_views].reshape(num_images, self._views_per_image, *by_view.shape[1:])


def _teacher_document(cache: Cache, name: str) -> bytes:
    try:
        return cache.storage.read(f"{unit_group(name)}/{DOCUMENT}")
    except FileNotFoundError:
        return b""


def _refuse_dropped(cache: Cache, name: str, shard: int, document: bytes) -> None:
    """Raise StaleCacheError if the teacher was dropped on another machine, or built anew with another codec, meanwhile.

    The receipt that was just written is removed then. `document` is the teacher's from before the work began.
    """
    current_document = _teacher_document(cache, name)
    # An empty document means that the folder is gone.
    if current_document == document and current_document:
        return
    drop_receipt(cache.storage, name, shard)
    fate = "made anew" if current_document else "dropped"
    raise StaleCacheError(
        f"{cache.url}: teacher '{name}' was {fate} by another process while it was built here: when that one has ended, the same "
        "command builds what is missing"
    )


def write_shard(
    cache: Cache,
    spec: TeacherSpec,
    shard: int,
    images: ShardImages,
    features: ShardFeatures,
    pool: ThreadPoolExecutor,
    stages: StageSeconds,
    document: bytes,
    events: BuildEvents,
) -> Receipt:
    """Commit one shard: scan results if it was not scanned before, codes, summaries, statistics, and last the receipt.

    Args:
        cache: the cache.
        spec: the teacher's spec.
        shard: number of the shard.
        images: usable rows, their views, and scan results.
        features: features of these rows.
        pool: threads that compress.
        stages: receives the time as `write`.
        document: the teacher's document from before the work began.
        events: receives `scanned` and `committed`.

    Raises:
        StaleCacheError: the teacher was dropped meanwhile.
    """
    num_rows = len(cache.meta.shard_rows(shard))
    with Stopwatch(stages, "write"):
        if images.scan_results:
            events.scanned(write_scan_results(cache, shard, images.scan_results))
        # Two builds of one teacher may compute other last bits: files of one beside a receipt of the other are a torn shard.
        with cache.storage.locked(f"{unit_group(spec.name)}/spatial"):
            try:
                receipt = read_receipt(cache.storage, spec.name, shard)
                if receipt is None or not is_finished(cache.storage, receipt, num_rows):
                    # A receipt from before the cache grew, or from before an image became readable, is no longer right.
                    failures = _drop_outdated(cache, spec.name, shard)
                    writer = ShardWriter(cache.storage, spec.name, shard)
                    # Positions of the usable rows in the shard; the others stay holes.
                    positions = [row - cache.meta.shard_rows(shard)[0] for row in images.rows]
                    _write_spatial(writer, cache, spec, shard, positions, features, pool)
                    if features.summary is not None:
                        _write_summaries(writer, cache, spec, shard, positions, features.summary)
                    if spec.view_sampling is not None:
                        _write_views(writer, cache, spec, shard, positions, images.views)
                    receipt = writer.commit(
                        {
                            "first_row": cache.meta.shard_rows(shard)[0],
                            "num_rows": num_rows,
                            "num_tokens": len(features.cosines),
                            "failures": failures,
                            "fidelity": _fidelity(features),
                        }
                    )
            except FileNotFoundError:  # the folder was removed while it was written to
                _refuse_dropped(cache, spec.name, shard, document)
                raise
        _refuse_dropped(cache, spec.name, shard, document)
    events.committed(receipt)
    return receipt


def _drop_outdated(cache: Cache, name: str, shard: int) -> tuple[Failure, ...]:
    """Remove a receipt of the shard that is no longer right, and return the failures of its images."""
    scan_receipt = read_receipt(cache.storage, IMAGES_UNIT, shard)
    failures = scan_receipt.failures if scan_receipt else ()
    num_rows = len(cache.meta.shard_rows(shard))
    drop_outdated_receipt(cache.storage, name, shard, num_rows, [failure.row for failure in failures])
    return failures


def _fidelity(features: ShardFeatures) -> Fidelity:
    if not len(features.cosines):
        return PERFECT
    # Sum over channels of (sum of squares - squared sum / n): n times the variance of the tokens.
    variance = float((features.sums[1] - np.square(features.sums[0]) / len(features.cosines)).sum())
    return fidelity_from_cosines(features.cosines, features.squared_errors, variance)


def _write_spatial(
    writer: ShardWriter,
    cache: Cache,
    spec: TeacherSpec,
    shard: int,
    positions: list[int],
    features: ShardFeatures,
    pool: ThreadPoolExecutor,
) -> None:
    """Write the maps, a file per view, and their sums. `positions`: of the usable rows in the shard."""
    meta, codes = cache.meta, features.codes  # (n, views, *row_shape)
    for view in range(spec.views):
        # Unusable images stay None, which a Zarr shard stores as empty chunks.
        chunks: list[NDArray[Any] | None] = [None] * len(meta.shard_rows(shard))
        for position, row_codes in zip(positions, codes[:, view], strict=True):
            chunks[position] = row_codes
        writer.write_sharded(
            "spatial",
            chunks,
            grid=(view, shard, *(0 for _ in range(codes.ndim - 2))),
            chunks_per_shard=meta.shard_images,
            zstd_level=cache.teachers[spec.name].codec.zstd_level,
            pool=pool,
        )
    writer.write_plain("stats/spatial", features.sums[None], grid=(shard, 0, 0))


def _write_summaries(
    writer: ShardWriter,
    cache: Cache,
    spec: TeacherSpec,
    shard: int,
    positions: list[int],
    summary: NDArray[np.float32],
) -> None:
    for view in range(spec.views):
        # NaN marks rows without a summary. (n, c) -> (1, shard_images, c)
        stored = np.full((1, cache.meta.shard_images, summary.shape[2]), np.nan, np.float16)
        stored[0, positions] = Half().encode(summary[:, view])  # `DeviceWork.codes` has refused what does not fit
        writer.write_plain("summary", stored, grid=(view, shard, 0))
    writer.write_plain("stats/summary", power_sums(summary)[None], grid=(shard, 0, 0))


def _write_views(
    writer: ShardWriter, cache: Cache, spec: TeacherSpec, shard: int, positions: list[int], views: Sequence[View]
) -> None:
    """Write which part of its image each view shows. `views`: of all positions in turn."""
    # (views, shard_images, 4), zeros for unusable images.
    boxes_xyxy_px = np.zeros((spec.views, cache.meta.shard_images, 4), np.int32)
    flipped = np.zeros((spec.views, cache.meta.shard_images), np.uint8)
    # The order in which `ShardImages.add` has collected the views.
    numbered = [(number, position) for position in positions for number in range(spec.views)]
    for (number, position), view in zip(numbered, views, strict=True):
        boxes_xyxy_px[number, position], flipped[number, position] = view.box_xyxy, view.flipped
    writer.write_plain("crop_xyxy", boxes_xyxy_px, grid=(0, shard, 0))
    writer.write_plain("flipped", flipped, grid=(0, shard))
