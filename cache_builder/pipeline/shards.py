"""The unit of work: one shard of one teacher, computed, encoded and committed.

`run_shards` does many of them overlapped: while the device computes, threads read, decode and resize the next images, and
another compresses and writes the last shard. At most so many images are under way as the device and the threads need, and
two shards' codes. Batches are cut within a shard, in row order, so the stored bytes depend neither on the number of
threads, nor on what an earlier run had already done.

Of a shard that was not scanned yet the images are decoded once: for the scan and for the teacher.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cache_builder.build_config import BuildConfig
from cache_builder.pipeline.batching import Batch, ShardImages, decoding
from cache_builder.pipeline.device import CodeBatch, DeviceWork, device_streams
from cache_builder.pipeline.image_access import ImageAccess
from cache_builder.pipeline.scan import write_scan_results
from cache_builder.pipeline.timing import StageSeconds, Stopwatch
from cache_builder.teachers.base import Teacher
from radio_cache.codecs import Half
from radio_cache.errors import StaleCacheError, UnstorableFeaturesError
from radio_cache.format.schema import IMAGES_UNIT, Receipt, TeacherSpec, unit_group
from radio_cache.format.zarr_json import DOCUMENT
from radio_cache.geometry.views import View
from radio_cache.prefetch.ordered import ahead
from radio_cache.reader import Cache
from radio_cache.receipts import drop_outdated_receipt, drop_receipt, is_finished, read_receipt, unfinished_shards
from radio_cache.statistics.fidelity import PERFECT, fidelity_from_cosines
from radio_cache.statistics.moments import power_sums
from radio_cache.writer import ShardWriter

Step = Callable[[int], None]
"""Told how many more images are done."""

Committed = Callable[[Receipt], object]
"""Told each shard that is on disk, in the thread that wrote it; the last one, too, when the work is stopped."""


def run_shards(
    cache: Cache,
    teacher: Teacher,
    shards: Iterable[int],
    config: BuildConfig,
    pool: ThreadPoolExecutor,
    stages: StageSeconds,
    *,
    step: Step = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
    committed: Committed = lambda _: None,
    looked: Committed = lambda _: None,
    access: ImageAccess | None = None,
) -> Generator[Receipt]:
    """Compute and commit shards of a teacher that is on its device, one after the other; each is finished when its receipt
    comes. Closed early, it finishes the shard that is being written and abandons those that are being computed.

    shards: no two alike; asked for the next one when all images of those before are being decoded. looked: told of shards
    that were not scanned before, and are now. access: reads the images.
    """
    spec, device = teacher.spec, torch.device(config.device)
    document = _teacher_document(cache, spec.name)
    usable = np.zeros(cache.num_images, np.bool_)
    usable[cache.usable_rows()] = True
    meta = cache.meta
    unseen = set(unfinished_shards(cache.receipt_columns(IMAGES_UNIT), meta.shard_rows, meta.num_shards))
    to_decode, to_compute, to_write = itertools.tee(shards, 3)

    def rows_of(shard: int) -> list[int]:
        return [row for row in meta.shard_rows(shard) if usable[row] or shard in unseen]

    begun: dict[int, ShardImages] = {}
    work = DeviceWork(teacher, device, stages, codec=cache.teachers[spec.name].codec, say=say)
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="write"))
        num_streams = stack.enter_context(device_streams(device))
        streams = stack.enter_context(ThreadPoolExecutor(num_streams, thread_name_prefix="device"))
        depth = (num_streams + 2) * -(-config.batch // spec.views) + config.threads
        jobs = ((row, tuple(range(spec.views))) for shard in to_decode for row in rows_of(shard))
        reads = access or ImageAccess(cache, leave_out=config.leave_out_unreadable)
        seen = ahead(pool, decoding(cache, reads, spec, unseen, stages), jobs, depth=depth)
        stack.callback(seen.close)
        batches = (
            batch
            for shard in to_compute
            for batch in begun.setdefault(shard, ShardImages()).batches(seen, len(rows_of(shard)), config.batch, stages)
        )
        results = ahead(streams, lambda batch: _codes(cache, work, spec, batch), batches, depth=num_streams + 1)
        stack.callback(results.close)
        last: Future[Receipt] | None = None
        for shard in to_write:
            features = _gathered(cache, spec, shard, results, stages, step)
            images = begun.pop(shard)
            step(len(meta.shard_rows(shard)) - len(images.rows))
            if last is not None:
                yield _awaited(last, stages)
            last = writer.submit(
                _timed_write,
                cache,
                spec,
                shard,
                images,
                features,
                pool,
                stages,
                document,
                looked=looked,
                committed=committed,
            )
        if last is not None:
            yield _awaited(last, stages)


def unstorable_image_error(cache: Cache, spec: TeacherSpec, error: UnstorableFeaturesError) -> UnstorableFeaturesError:
    """Return the error with the cache, the teacher, the image and what to do about it."""
    key = cache.index.key(error.row)
    return UnstorableFeaturesError(
        error.row,
        f"{cache.url}, teacher '{spec.name}', image {key}: {error}. If this image alone is at fault, leave it out of a new "
        f"cache: --filter '!{key}'",
    )


def _codes(cache: Cache, work: DeviceWork, spec: TeacherSpec, whole: Batch) -> tuple[list[CodeBatch], bool]:
    """The codes of a batch, and whether it is its shard's last."""
    batch = whole.shown
    try:
        return work.codes(batch) if batch else [], whole.last
    except UnstorableFeaturesError as exc:
        raise unstorable_image_error(cache, spec, exc) from exc


def _awaited(written: Future[Receipt], stages: StageSeconds) -> Receipt:
    with Stopwatch(stages, "wait_write"):
        return written.result()


@dataclass(frozen=True)
class ShardFeatures:
    """What one shard stores of its usable rows, in row order, and what it cost.

    codes (n, views, *row_shape); summary (n, views, c) or None; sums (2, c): sum and sum of squares over all tokens;
    squared_errors: summed over them; cosines: of each.
    """

    codes: NDArray[Any]
    summary: NDArray[np.float32] | None
    sums: NDArray[np.float64]
    cosines: NDArray[np.float32]
    squared_errors: float


def _gathered(
    cache: Cache,
    spec: TeacherSpec,
    shard: int,
    results: Iterator[tuple[list[CodeBatch], bool]],
    stages: StageSeconds,
    step: Step,
) -> ShardFeatures:
    """The codes of one shard, batch by batch: full-precision maps never pile up."""
    cached = cache.teachers[spec.name]
    most = len(cache.meta.shard_rows(shard)) * spec.views
    codes = np.empty((most, *cached.row_shape), cached.codec.dtype)
    summary = None if spec.summary_dim is None else np.empty((most, spec.summary_dim), np.float32)
    sums, squared_errors = np.zeros((2, spec.spatial_dim)), 0.0
    cosines = [np.zeros(0, np.float32)]
    done, last = 0, False
    while not last:
        parts, last = _next(results, stages)
        for part in parts:
            here = slice(done, done + len(part.codes))
            codes[here] = part.codes
            if summary is not None and part.summary is not None:
                summary[here] = part.summary
            for image_sums, error in zip(part.sums, part.squared_errors, strict=True):
                sums += image_sums
                squared_errors += float(error)
            cosines.append(part.cosines)
            step(here.stop // spec.views - done // spec.views)
            done = here.stop
    by_view = (done // spec.views, spec.views)
    return ShardFeatures(
        codes[:done].reshape(*by_view, *codes.shape[1:]),
        None if summary is None else summary[:done].reshape(*by_view, summary.shape[1]),
        sums,
        np.concatenate(cosines),
        squared_errors,
    )


def _next(results: Iterator[tuple[list[CodeBatch], bool]], stages: StageSeconds) -> tuple[list[CodeBatch], bool]:
    """The next batch of results. What was waited for is the device, but for the time that images were not ready."""
    started, waited = time.perf_counter(), stages.wait_decode
    found = next(results)
    stages.wait_device += time.perf_counter() - started - (stages.wait_decode - waited)
    return found


def _timed_write(
    cache: Cache,
    spec: TeacherSpec,
    shard: int,
    images: ShardImages,
    features: ShardFeatures,
    pool: ThreadPoolExecutor,
    stages: StageSeconds,
    document: bytes,
    *,
    looked: Committed,
    committed: Committed,
) -> Receipt:
    with Stopwatch(stages, "write"):
        if images.looks:
            looked(write_scan_results(cache, shard, images.looks))
        # Two builds of one teacher may compute other last bits: files of one beside a receipt of the other are a torn shard.
        with cache.storage.locked(f"{unit_group(spec.name)}/spatial"):
            try:
                receipt = read_receipt(cache.storage, spec.name, shard)
                if receipt is None or not is_finished(cache.storage, receipt, len(cache.meta.shard_rows(shard))):
                    receipt = write_shard(cache, spec, shard, images, features, pool)
            except FileNotFoundError:  # a folder that is taken away while it is written to
                _refuse_dropped(cache, spec.name, shard, document)
                raise
        _refuse_dropped(cache, spec.name, shard, document)
    committed(receipt)
    return receipt


def _teacher_document(cache: Cache, name: str) -> bytes:
    try:
        return cache.storage.read(f"{unit_group(name)}/{DOCUMENT}")
    except FileNotFoundError:
        return b""


def _refuse_dropped(cache: Cache, name: str, shard: int, document: bytes) -> None:
    """Raise StaleCacheError if the teacher is no longer the one whose shards these are: drop-teacher on another machine, and
    perhaps another build that made it anew with another codec. What was just written of it is taken back.

    document: the teacher's, from before the work began.
    """
    now = _teacher_document(cache, name)
    if now == document and now:
        return
    drop_receipt(cache.storage, name, shard)
    raise StaleCacheError(
        f"{cache.url}: teacher '{name}' was {'made anew' if now else 'dropped'} by another process while it was built here: when "
        "that one has ended, the same command builds what is missing"
    )


def write_shard(
    cache: Cache, spec: TeacherSpec, shard: int, images: ShardImages, features: ShardFeatures, pool: ThreadPoolExecutor
) -> Receipt:
    """Commit one shard: codes, summaries, sums for the statistics, and last the receipt."""
    meta = cache.meta
    shard_rows = meta.shard_rows(shard)
    places = [row - shard_rows[0] for row in images.rows]
    looked_at = read_receipt(cache.storage, IMAGES_UNIT, shard)
    failures = looked_at.failures if looked_at else ()
    drop_outdated_receipt(cache.storage, spec.name, shard, len(shard_rows), [failure.row for failure in failures])
    writer = ShardWriter(cache.storage, spec.name, shard)
    codec, row_axes = cache.teachers[spec.name].codec, features.codes.ndim - 2
    for view in range(spec.views):
        chunks: list[NDArray[Any] | None] = [None] * len(shard_rows)
        for place, codes in zip(places, features.codes[:, view], strict=True):
            chunks[place] = codes
        writer.write_sharded(
            "spatial",
            chunks,
            grid=(view, shard, *(0 for _ in range(row_axes))),
            chunks_per_shard=meta.shard_images,
            zstd_level=codec.zstd_level,
            pool=pool,
        )
    writer.write_plain("stats/spatial", features.sums[None], grid=(shard, 0, 0))
    if features.summary is not None:
        _write_summaries(writer, cache, spec, shard, places, features.summary)
    if spec.view_sampling is not None:
        _write_views(writer, cache, spec, shard, places, images.views)
    fidelity = PERFECT
    if len(features.cosines):
        variance = float((features.sums[1] - np.square(features.sums[0]) / len(features.cosines)).sum())
        fidelity = fidelity_from_cosines(features.cosines, features.squared_errors, variance)
    return writer.commit(
        {
            "first_row": shard_rows[0],
            "num_rows": len(shard_rows),
            "num_tokens": len(features.cosines),
            "failures": failures,
            "fidelity": fidelity,
        }
    )


def _write_summaries(
    writer: ShardWriter, cache: Cache, spec: TeacherSpec, shard: int, places: list[int], summary: NDArray[np.float32]
) -> None:
    for view in range(spec.views):
        stored = np.full((1, cache.meta.shard_images, summary.shape[2]), np.nan, np.float16)
        stored[0, places] = Half().encode(summary[:, view])  # which `DeviceWork.codes` has made sure of
        writer.write_plain("summary", stored, grid=(view, shard, 0))
    writer.write_plain("stats/summary", power_sums(summary)[None], grid=(shard, 0, 0))


def _write_views(
    writer: ShardWriter, cache: Cache, spec: TeacherSpec, shard: int, places: list[int], views: Sequence[View]
) -> None:
    """Which part of its image each view shows. views: of all places in turn."""
    boxes = np.zeros((spec.views, cache.meta.shard_images, 4), np.int32)
    flipped = np.zeros((spec.views, cache.meta.shard_images), np.uint8)
    each = [(number, place) for place in places for number in range(spec.views)]
    for (number, place), view in zip(each, views, strict=True):
        boxes[number, place], flipped[number, place] = view.box_xyxy, view.flipped
    writer.write_plain("crop_xyxy", boxes, grid=(0, shard, 0))
    writer.write_plain("flipped", flipped, grid=(0, shard))
