"""One pass over a cache: of the scan, or of one teacher, over all shards that are not there yet."""

import contextlib
import time
from collections.abc import Callable, Collection, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from cache_builder.build_config import BuildConfig
from cache_builder.build_output import OnMessage, check_same
from cache_builder.computed_with import recorded
from cache_builder.pipeline.calibrate import choose_codec, fewest_images, images_wanted, sample_rows
from cache_builder.pipeline.device import DeviceWork, device_streams
from cache_builder.pipeline.image_access import ImageAccess, is_listed_file
from cache_builder.pipeline.log import BuildLog, UnitLog
from cache_builder.pipeline.scan import look, rescan_failures, scan_shard
from cache_builder.pipeline.shards import run_shards, unstorable_image_error
from cache_builder.pipeline.timing import StageSeconds
from cache_builder.pipeline.views import prefetch_views
from cache_builder.teachers.base import Teacher
from radio_cache.errors import CodecError, SourceError, UnstorableFeaturesError
from radio_cache.format.schema import IMAGES_UNIT
from radio_cache.prefetch.ordered import ahead
from radio_cache.reader import Cache
from radio_cache.receipts import compact_receipts, read_receipt, shards_lacking_rows, unfinished_shards
from radio_cache.terminal.output import ProgressLine
from radio_cache.writer import add_teacher

_LOOKS_AHEAD = 8
"""Images decoded ahead for a sample; what is beyond the last one wanted was decoded for nothing."""


@dataclass(frozen=True)
class TeacherResult:
    """What one teacher's pass did. images: computed by this run, not counting unusable ones; seconds: wall time."""

    name: str
    images: int
    images_before: int
    seconds: float
    stages: StageSeconds


def scan_images(
    cache: Cache,
    pool: ThreadPoolExecutor,
    say: OnMessage,
    log: BuildLog,
    *,
    leave: Collection[int] = (),
    access: ImageAccess | None = None,
) -> None:
    """Look once at every image that was not looked at yet, but those of the shards to leave. Raises SourceError if all have
    been looked at, and none can be used; and as `ImageAccess` does."""
    todo = [shard for shard in missing_shards(cache, IMAGES_UNIT) if shard not in leave]
    total = sum(len(cache.meta.shard_rows(shard)) for shard in todo)
    if todo:
        unit = UnitLog(log, IMAGES_UNIT)
        with (
            ProgressLine("checking images", cache.num_images, done=cache.num_images - total) as progress,
            told_if_stopped(unit, cache, IMAGES_UNIT, say),
        ):
            for shard in todo:
                receipt = scan_shard(cache, shard, pool, access)
                unit.shard(receipt)
                progress.advance(receipt.num_rows, unit.note)
        unit.end("scan")
    if not missing_shards(cache, IMAGES_UNIT):
        report_unusable_images(cache, say)


def report_unusable_images(cache: Cache, say: OnMessage) -> None:
    """After all images were looked at. Raises SourceError if none can be used."""
    compact_receipts(cache.storage, IMAGES_UNIT)
    failures = sorted(cache.failures(), key=lambda failure: failure.is_unreadable)
    if failures:
        index = cache.index
        say(f"{len(failures)} of {cache.num_images} images cannot be used and are left out:")
        for failure in failures[:5]:
            say(f"  {index.key(failure.row)}: {failure.reason}")
        if len(failures) > 5:
            say(f"  ... and {len(failures) - 5} more: radio-cache info {cache.url} --failures")
    unreadable = [failure for failure in failures if failure.is_unreadable]
    if unreadable:
        first = unreadable[0]
        say(
            f"{len(unreadable)} of them could not be read, and may be fine ({cache.index.key(first.row)}: {first.reason}): the "
            "same command looks at them again"
        )
    if len(failures) == cache.num_images:
        raise SourceError(f"none of the {cache.num_images} images can be used: radio-cache info {cache.url} --failures")


def retry_failures(
    cache: Cache, config: BuildConfig, pool: ThreadPoolExecutor, access: ImageAccess, say: OnMessage
) -> Cache:
    """Look again at images that could not be read, or with --retry-unusable at all that could not be used; return the cache
    with what was found.

    Raises as `ImageAccess` does; however many of them cannot be read still.
    """
    if config.leave_out_unreadable and not config.retry_unusable:
        return cache
    if not len(cache.receipt_columns(IMAGES_UNIT).failed_rows):
        return cache
    failures = [failure for failure in cache.failures() if config.retry_unusable or failure.is_unreadable]
    if not failures:
        return cache
    usable = rescan_failures(cache, failures, pool, access)
    say(f"{len(failures)} images that could not be used were looked at again: {usable} can be used now")
    return Cache(cache.storage)


def register_teacher(
    cache: Cache,
    teacher: Teacher,
    config: BuildConfig,
    pool: ThreadPoolExecutor,
    say: OnMessage,
    scan: Callable[[], None] = lambda: None,
    access: ImageAccess | None = None,
) -> Cache:
    """Choose the codec of a teacher that is new, and make its group. Raises StaleCacheError if it is another's now.

    scan: called if all images have to be looked at first, to know which there are to choose by.
    """
    name = teacher.spec.name
    reads = access or ImageAccess(cache, leave_out=config.leave_out_unreadable)
    if name not in cache.teachers:
        wanted = images_wanted(teacher.spec)
        leave_out = config.leave_out_unreadable or not wanted or cache.num_images < fewest_images(teacher.spec)
        sample = usable_sample(cache, name, max(1, wanted), pool, reads, leave_out=leave_out)
        if sample is None:
            scan()
            cache = Cache(cache.storage)
            sample = usable_sample(cache, name, max(1, wanted), pool, reads, leave_out=leave_out) or []
        try:
            chosen = choose_codec(
                teacher.spec, sample, lambda rows: tokens_of(cache, teacher, rows, config, pool, say, reads)
            )
        except UnstorableFeaturesError as exc:
            raise unstorable_image_error(cache, teacher.spec, exc) from exc
        except CodecError as exc:
            raise CodecError(f"{cache.url}, teacher '{name}': {exc}") from exc
        if chosen.note:
            say(f"{name}: {chosen.note}")
        spec = recorded(replace(teacher.spec, codec=chosen.recorded), config)
        add_teacher(cache.storage, cache.meta, spec, chosen.codec)
    joined = Cache(cache.storage)
    check_same(joined, [teacher.spec])  # another process may have been faster; what it chose is what counts
    return joined


def usable_sample(
    cache: Cache,
    name: str,
    count: int,
    pool: ThreadPoolExecutor,
    access: ImageAccess | None = None,
    *,
    leave_out: bool = True,
) -> list[int] | None:
    """The first `count` usable rows, or as many as there are, of a seeded order of all images; another order for every
    teacher. The same whether they were scanned already or not: then they are decoded for it.

    None if that does not bring enough, with twice as many images as are wanted: they have to be scanned.
    leave_out: pass over images that cannot be read. Otherwise raises SourceError for one, unless a list named it: a codec that is
    chosen without it would not be the one of an undisturbed build.
    """
    meta, reads = cache.meta, access or ImageAccess(cache)
    unseen = set(missing_shards(cache, IMAGES_UNIT))
    if unseen and cache.num_images < count:
        return None
    usable = np.zeros(cache.num_images, np.bool_)
    usable[cache.usable_rows()] = True

    def is_fine(row: int) -> tuple[int, bool]:
        if row // meta.shard_images in unseen:
            seen, image = look(reads, row)
            unreadable = seen.reason if seen.kind == "surroundings" else None
            fine = image is not None
        else:
            fine = bool(usable[row])
            unreadable = None if fine or leave_out else _recorded_as_unreadable(cache, row)
        if unreadable is not None and not leave_out and not is_listed_file(cache, row):
            raise SourceError(
                f"image {cache.index.key(row)}, one of those that the codec of '{name}' is chosen by: {unreadable}. Make it "
                "readable and run the same command again; or leave out what cannot be read: --leave-out-unreadable"
            )
        return row, fine

    order = sample_rows(np.arange(cache.num_images), 2 * count if unseen else cache.num_images, name)
    found: list[int] = []
    with contextlib.closing(ahead(pool, is_fine, order, depth=_LOOKS_AHEAD)) as looked:
        for row, fine in looked:
            if fine:
                found.append(row)
            if len(found) == count:
                return found
    return None if unseen else found


def _recorded_as_unreadable(cache: Cache, row: int) -> str | None:
    """Why an image could not be read; None if it could."""
    receipt = read_receipt(cache.storage, IMAGES_UNIT, row // cache.meta.shard_images)
    failures = receipt.failures if receipt else ()
    return next((one.reason for one in failures if one.row == row and one.is_unreadable), None)


def tokens_of(
    cache: Cache,
    teacher: Teacher,
    rows: list[int],
    config: BuildConfig,
    pool: ThreadPoolExecutor,
    say: OnMessage,
    access: ImageAccess | None = None,
) -> Generator[NDArray[np.float32]]:
    """For each row its tokens (n, c) that show the image: of one of its views, each in turn."""
    spec, device, stages = teacher.spec, torch.device(config.device), StageSeconds()
    work = DeviceWork(teacher, device, stages, say=say)
    jobs = [(row, (number % spec.views,)) for number, row in enumerate(rows)]
    with (
        ProgressLine(f"{spec.name}, calibrating", len(rows)) as line,
        device_streams(device) as num_streams,
        ThreadPoolExecutor(num_streams, thread_name_prefix="device") as streams,
    ):
        depth = (num_streams + 2) * config.batch + config.threads
        unseen = set(missing_shards(cache, IMAGES_UNIT))
        seen = prefetch_views(cache, spec, jobs, pool, stages, depth=depth, unseen=unseen, access=access)
        batches = (list(islice(seen, config.batch)) for _ in range(0, len(rows), config.batch))
        for parts in ahead(streams, work.features, batches, depth=num_streams + 1):
            for part in parts:
                line.advance(len(part.shown))
                for one, image in zip(part.shown, part.spatial.cpu().numpy(), strict=True):
                    yield image[one.valid_tokens(spec.geometry)]


def run_teacher(
    cache: Cache,
    teacher: Teacher,
    config: BuildConfig,
    pool: ThreadPoolExecutor,
    say: OnMessage,
    log: BuildLog,
    access: ImageAccess | None = None,
) -> TeacherResult:
    """Compute what is missing of a teacher that has joined the cache, and look at images that nobody has looked at yet."""
    name = teacher.spec.name
    todo, unseen = missing_shards(cache, name), missing_shards(cache, IMAGES_UNIT)
    if not set(unseen) <= set(todo):
        scan_images(cache, pool, say, log, leave=todo, access=access)
    total = sum(len(cache.meta.shard_rows(shard)) for shard in todo)
    stages = StageSeconds()
    started = time.perf_counter()
    unit, scan = UnitLog(log, name, stages), UnitLog(log, IMAGES_UNIT)
    if todo:
        with (
            ProgressLine(name, cache.num_images, done=cache.num_images - total) as line,
            told_if_stopped(unit, cache, name, say),
        ):

            def step(count: int) -> None:
                line.advance(count, ", ".join(filter(None, (stages.bottleneck(), unit.note))))

            receipts = run_shards(
                cache,
                teacher,
                todo,
                config,
                pool,
                stages,
                say=say,
                step=step,
                committed=unit.shard,
                looked=scan.shard,
                access=access,
            )
            with contextlib.closing(receipts):
                for _ in receipts:
                    step(0)  # its images are counted already, what was written of them is not
    compact_receipts(cache.storage, name)
    seconds = time.perf_counter() - started
    if scan.images or scan.failures:
        scan.end("scan")
    unit.end("teacher")
    if set(unseen) & set(todo):
        cache = Cache(cache.storage)
        report_unusable_images(cache, say)
    usable = cache.usable_rows()
    images = int(np.isin(usable // cache.meta.shard_images, todo).sum())
    return TeacherResult(name, images, len(usable) - images, seconds, stages)


@contextlib.contextmanager
def told_if_stopped(unit: UnitLog, cache: Cache, name: str, say: OnMessage) -> Generator[None]:
    """On Ctrl-C: how many shards are done, after the one that was being written."""
    try:
        yield
    except KeyboardInterrupt:
        left = len(missing_shards(cache, name))
        say(f"\n{name}: {cache.meta.num_shards - left} of {cache.meta.num_shards} shards are done and stay")
        unit.end("stopped")
        raise


def missing_shards(cache: Cache, unit: str) -> list[int]:
    """Shards of a unit that a build has yet to make, or to make again for an image that can be used by now."""
    meta, columns = cache.meta, cache.receipt_columns(unit)
    missing = unfinished_shards(columns, meta.shard_rows, meta.num_shards)
    if unit == IMAGES_UNIT or not len(columns.failed_rows):
        return missing
    lacking = shards_lacking_rows(columns, cache.receipt_columns(IMAGES_UNIT), meta.shard_images)
    return sorted({*missing, *lacking})
