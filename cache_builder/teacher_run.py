"""One pass over a cache: of the scan, or of one teacher, over all shards that are not there yet.

Files are read, decoded and resized in threads while the teacher computes and the previous shard is written.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from cache_builder.build_config import BuildConfig
from cache_builder.build_output import Say, check_same
from cache_builder.calibrate import choose_codec
from cache_builder.scan import scan_shard
from cache_builder.shard_work import compute_shard, forward_passes, pixels_ahead, tokens_on_images, write_shard
from cache_builder.stages import StageSeconds, Stopwatch
from cache_builder.teachers.base import Teacher
from radio_cache.cli_support import ProgressLine
from radio_cache.errors import CodecError, SourceError
from radio_cache.reader import Cache
from radio_cache.receipts import compact_receipts, unfinished_shards
from radio_cache.schema import IMAGES_UNIT, Receipt
from radio_cache.writer import add_teacher


@dataclass(frozen=True)
class TeacherResult:
    """What one teacher's pass did. images: computed by this run, not counting unusable ones; seconds: wall time."""

    name: str
    images: int
    images_before: int
    seconds: float
    stages: StageSeconds


def scan_images(cache: Cache, pool: ThreadPoolExecutor, say: Say) -> None:
    """Look once at every image that was not looked at yet. Raises SourceError if none can be used."""
    todo = missing_shards(cache, IMAGES_UNIT)
    total = sum(len(cache.meta.shard_rows(shard)) for shard in todo)
    if todo:
        with ProgressLine("checking images", cache.num_images, done=cache.num_images - total) as progress:
            for shard in todo:
                progress.advance(scan_shard(cache, shard, pool).num_rows)
    compact_receipts(cache.storage, IMAGES_UNIT)
    failures = cache.failures()
    if failures:
        index = cache.index
        say(f"{len(failures)} of {cache.num_images} images cannot be used and are left out:")
        for failure in failures[:5]:
            say(f"  {index.key(failure.row)}: {failure.reason}")
        if len(failures) > 5:
            say(f"  ... and {len(failures) - 5} more: radio-cache info {cache.url} --failures")
    if len(failures) == cache.num_images:
        raise SourceError(f"none of the {cache.num_images} images can be used: radio-cache info {cache.url} --failures")


def join_teacher(cache: Cache, teacher: Teacher, config: BuildConfig, pool: ThreadPoolExecutor, say: Say) -> Cache:
    """Choose the codec of a teacher that is new, and make its group. Raises StaleCacheError if it is another's now."""
    name = teacher.spec.name
    if name not in cache.teachers:

        def tokens_of(rows: list[int]) -> Iterator[NDArray[np.float32]]:
            with ProgressLine(f"{name}, calibrating", len(rows)) as line:
                pixels = pixels_ahead(cache, teacher, rows, config, pool)
                for batch_rows, spatial, _ in forward_passes(rows, pixels, teacher, cache, config, StageSeconds()):
                    line.advance(len(batch_rows))
                    valid = torch.from_numpy(tokens_on_images(cache, batch_rows, teacher.spec.geometry))
                    for image, mask in zip(spatial.cpu(), valid, strict=True):
                        yield image[mask].numpy()

        try:
            chosen = choose_codec(teacher.spec, cache.usable_rows(), tokens_of)
        except CodecError as exc:
            raise CodecError(f"{cache.url}, teacher '{name}': {exc}") from exc
        if chosen.note:
            say(f"{name}: {chosen.note}")
        add_teacher(cache.storage, cache.meta, replace(teacher.spec, codec=chosen.recorded), chosen.codec)
    joined = Cache(cache.storage)
    check_same(joined, [teacher.spec])  # another process may have been faster; what it chose is what counts
    return joined


def run_teacher(cache: Cache, teacher: Teacher, config: BuildConfig, pool: ThreadPoolExecutor) -> TeacherResult:
    """Compute what is missing of a teacher that has joined the cache."""
    name = teacher.spec.name
    todo = missing_shards(cache, name)
    total = sum(len(cache.meta.shard_rows(shard)) for shard in todo)
    done = cache.num_images - total
    stages = StageSeconds()
    started = time.perf_counter()
    usable = np.isin(np.arange(cache.num_images), cache.usable_rows())
    rows = [row for shard in todo for row in cache.meta.shard_rows(shard) if usable[row]]
    if todo:
        with (
            ThreadPoolExecutor(1, thread_name_prefix="write") as writers,
            ProgressLine(name, cache.num_images, done=done) as line,
        ):
            pixels = pixels_ahead(cache, teacher, rows, config, pool)
            last: Future[Receipt] | None = None
            for shard in todo:
                shard_rows = [row for row in cache.meta.shard_rows(shard) if usable[row]]
                features = compute_shard(shard_rows, pixels, teacher, cache, config, stages, line)
                line.advance(len(cache.meta.shard_rows(shard)) - len(shard_rows), stages.bottleneck())
                with Stopwatch(stages, "write"):
                    if last is not None:
                        last.result()
                last = writers.submit(write_shard, cache, teacher, shard, shard_rows, features)
            with Stopwatch(stages, "write"):
                if last is not None:
                    last.result()
    compact_receipts(cache.storage, name)
    return TeacherResult(name, len(rows), int(usable.sum()) - len(rows), time.perf_counter() - started, stages)


def missing_shards(cache: Cache, unit: str) -> list[int]:
    """Shards of a unit that a build has yet to make."""
    return unfinished_shards(cache.receipt_columns(unit), cache.meta.shard_rows, cache.meta.num_shards)
