"""Passes over a cache: the scan, the registration of a teacher, and what precedes and follows a teacher's shards."""

import contextlib
import time
from collections.abc import Collection, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice

import numpy as np
import torch

from cache_builder.build_config import BuildConfig
from cache_builder.build_output import missing_shards
from cache_builder.computed_with import recorded
from cache_builder.pipeline.calibrate import (
    Calibration,
    codec_without_calibration,
    min_calibration_images,
    num_images_wanted,
    resolve_codec_request,
    sample_rows,
)
from cache_builder.pipeline.device import DeviceWork, MapBatch, device_streams
from cache_builder.pipeline.events import BuildEvents
from cache_builder.pipeline.image_access import ImageAccess, is_listed_file
from cache_builder.pipeline.scan import rescan_failures, scan_image, scan_shard
from cache_builder.pipeline.shards import unstorable_image_error
from cache_builder.pipeline.timing import StageSeconds
from cache_builder.pipeline.views import prefetch_views
from cache_builder.teachers.base import Teacher
from radio_cache.errors import CodecError, SourceError, UnstorableFeaturesError
from radio_cache.format.schema import IMAGES_UNIT, TeacherSpec, unit_group
from radio_cache.prefetch.ordered import prefetch_map
from radio_cache.reader import Cache
from radio_cache.receipts import compact_receipts, read_receipt
from radio_cache.writer import add_teacher

_SAMPLE_DEPTH = 8
"""Images decoded ahead for a sample. Those beyond the last one needed are decoded in vain."""

_NAMED_FAILURES = 5


@dataclass(frozen=True)
class TeacherResult:
    """Result of one teacher's pass.

    Attributes:
        name: group of the teacher in the cache.
        images: usable images computed by this run.
        images_before: usable images that were there before.
        seconds: wall time.
        stages: seconds by stage.
    """

    name: str
    images: int
    images_before: int
    seconds: float
    stages: StageSeconds


def scan_images(
    cache: Cache,
    pool: ThreadPoolExecutor,
    events: BuildEvents,
    *,
    skip: Collection[int] = (),
    access: ImageAccess | None = None,
) -> None:
    """Scan every image that has not been scanned, except those of the shards to skip.

    Raises:
        SourceError: all images have been scanned, and none can be used; and as `ImageAccess` does.
    """
    todo = [shard for shard in missing_shards(cache, IMAGES_UNIT) if shard not in skip]
    if todo:
        with events.shard_pass(cache, IMAGES_UNIT, todo, title="checking images"):
            for shard in todo:
                receipt = scan_shard(cache, shard, pool, access)
                events.scanned(receipt)
                events.progress(receipt.num_rows)
    if not missing_shards(cache, IMAGES_UNIT):
        report_unusable_images(cache, events)


def report_unusable_images(cache: Cache, events: BuildEvents) -> None:
    """Report the images that cannot be used, after all have been scanned. Raise SourceError if none can be used."""
    compact_receipts(cache.storage, IMAGES_UNIT)
    # Broken images first: those that could not be read are reported once more below.
    failures = sorted(cache.failures(), key=lambda failure: failure.is_unreadable)
    if failures:
        index = cache.index
        events.message(f"{len(failures)} of {cache.num_images} images cannot be used and are left out:")
        for failure in failures[:_NAMED_FAILURES]:
            events.message(f"  {index.key(failure.row)}: {failure.reason}")
        if len(failures) > _NAMED_FAILURES:
            num_more = len(failures) - _NAMED_FAILURES
            events.message(f"  ... and {num_more} more: radio-cache info {cache.url} --failures")
    unreadable = [failure for failure in failures if failure.is_unreadable]
    if unreadable:
        first = unreadable[0]
        events.message(
            f"{len(unreadable)} of them could not be read, and may be fine ({cache.index.key(first.row)}: {first.reason}): the "
            "same command looks at them again"
        )
    # Nothing can be built from such a cache, and the reason is more likely a wrong path than broken images.
    if len(failures) == cache.num_images:
        raise SourceError(f"none of the {cache.num_images} images can be used: radio-cache info {cache.url} --failures")


def retry_failures(
    cache: Cache, config: BuildConfig, pool: ThreadPoolExecutor, access: ImageAccess, events: BuildEvents
) -> bool:
    """Scan images again that could not be read, or with `retry_unusable` all that could not be used.

    Returns:
        Whether there were any, so that the cache has to be opened again.

    Raises:
        SourceError: as `ImageAccess` does. It is no error that some still cannot be read, however many.
    """
    if config.leave_out_unreadable and not config.retry_unusable:
        return False
    # The columns are cheap to read; the failures themselves are a file for every shard.
    if not len(cache.receipt_columns(IMAGES_UNIT).failed_rows):
        return False
    failures = [failure for failure in cache.failures() if config.retry_unusable or failure.is_unreadable]
    if not failures:
        return False
    num_usable = rescan_failures(cache, failures, pool, access)
    events.message(f"{len(failures)} images that could not be used were looked at again: {num_usable} can be used now")
    return True


def codec_sample(
    cache: Cache, spec: TeacherSpec, config: BuildConfig, pool: ThreadPoolExecutor, access: ImageAccess
) -> list[int] | None:
    """Return the rows that a new teacher's codec is chosen by, or None if all images have to be scanned first.

    Raises:
        SourceError: an image of the sample cannot be read.
    """
    count = num_images_wanted(spec)
    # A codec that is chosen without an image would differ from that of an undisturbed build. Where no image decides, or
    # there are too few to calibrate anyway, an unreadable one does no harm.
    leave_out = config.leave_out_unreadable or not count or cache.num_images < min_calibration_images(spec)
    return usable_sample(cache, spec.name, max(1, count), pool, access, leave_out=leave_out)


def register_teacher(
    cache: Cache,
    teacher: Teacher,
    sample: Sequence[int],
    config: BuildConfig,
    pool: ThreadPoolExecutor,
    events: BuildEvents,
    access: ImageAccess,
) -> None:
    """Choose the codec of a teacher that is not in the cache, and make its group.

    A group that another process has made meanwhile stays as it is.

    Args:
        cache: the cache.
        teacher: the teacher, which is on its device.
        sample: usable rows to choose the codec by, as `codec_sample` returns them.
        config: batch size, device and threads.
        pool: threads that decode.
        events: receives the progress of a calibration, and a message about the codec.
        access: reads the images.

    Raises:
        CodecError: there are too few images for the requested codec, or its fidelity is out of reach.
        UnstorableFeaturesError: features of an image are not finite.
    """
    name = teacher.spec.name
    try:
        request, note = resolve_codec_request(teacher.spec, len(sample))
        if request.needs_calibration:
            calibration = Calibration(request, sample)
            with calibration_batches(cache, teacher, sample, config, pool, events, access) as map_batches:
                for part in chain.from_iterable(map_batches):
                    events.progress(len(part.views))
                    for view, features in zip(part.views, part.spatial.cpu().numpy(), strict=True):
                        calibration.add(features, view.valid_tokens(teacher.spec.geometry))
            chosen = calibration.finish()
        else:
            chosen = codec_without_calibration(request, note)
    except UnstorableFeaturesError as exc:
        raise unstorable_image_error(cache, teacher.spec, exc) from exc
    except CodecError as exc:
        raise CodecError(f"{cache.url}, teacher '{name}': {exc}") from exc
    if chosen.note:
        events.message(f"{name}: {chosen.note}")
    # The batch size belongs to the record: later builds of the teacher have to take it.
    spec = recorded(replace(teacher.spec, codec=chosen.recorded), config)
    add_teacher(cache.storage, cache.meta, spec, chosen.codec)


def usable_sample(
    cache: Cache,
    name: str,
    count: int,
    pool: ThreadPoolExecutor,
    access: ImageAccess | None = None,
    *,
    leave_out: bool = True,
) -> list[int] | None:
    """Return the first `count` usable rows of a seeded order of all images, or fewer if there are no more.

    The order differs from teacher to teacher. It is the same whether the images have been scanned or not; images that have
    not are decoded to see whether they are usable.

    Args:
        cache: the cache.
        name: group of the teacher.
        count: number of rows.
        pool: threads that decode.
        access: reads the images; None for a new one.
        leave_out: pass over images that cannot be read.

    Returns:
        The rows, or None if twice as many images as are needed do not suffice, and not all have been scanned.

    Raises:
        SourceError: an image cannot be read, is not to be left out, and was not named by a list.
    """
    meta, reads = cache.meta, access or ImageAccess(cache)
    unscanned = set(missing_shards(cache, IMAGES_UNIT))
    # Every image would be decoded for the sample alone.
    if unscanned and cache.num_images < count:
        return None
    is_usable = np.zeros(cache.num_images, np.bool_)
    is_usable[cache.usable_rows()] = True

    def check(row: int) -> tuple[int, bool]:
        if row // meta.shard_images in unscanned:
            result, image = scan_image(reads, row)
            unreadable = result.reason if result.kind == "surroundings" else None
            # The image is dropped: the pass decodes it again, because a sample of maps may not fit into memory.
            usable = image is not None
        else:
            usable = bool(is_usable[row])
            unreadable = None if usable or leave_out else _recorded_as_unreadable(cache, row)
        if unreadable is not None and not leave_out and not is_listed_file(cache, row):
            raise SourceError(
                f"image {cache.index.key(row)}, one of those that the codec of '{name}' is chosen by: {unreadable}. Make it "
                "readable and run the same command again; or leave out what cannot be read: --leave-out-unreadable"
            )
        return row, usable

    # Twice as many are tried, so that a few broken images do not force a scan of all.
    order = sample_rows(np.arange(cache.num_images), 2 * count if unscanned else cache.num_images, name)
    sample: list[int] = []
    # Closing cancels the images that are decoded ahead in vain.
    with contextlib.closing(prefetch_map(pool, check, order, depth=_SAMPLE_DEPTH)) as checked:
        for row, usable in checked:
            if usable:
                sample.append(row)
            if len(sample) == count:
                return sample
    return None if unscanned else sample


def _recorded_as_unreadable(cache: Cache, row: int) -> str | None:
    """Return why an image could not be read, or None if it could."""
    receipt = read_receipt(cache.storage, IMAGES_UNIT, row // cache.meta.shard_images)
    failures = receipt.failures if receipt else ()
    return next((failure.reason for failure in failures if failure.row == row and failure.is_unreadable), None)


@contextlib.contextmanager
def calibration_batches(
    cache: Cache,
    teacher: Teacher,
    rows: Sequence[int],
    config: BuildConfig,
    pool: ThreadPoolExecutor,
    events: BuildEvents,
    access: ImageAccess,
) -> Generator[Generator[list[MapBatch]]]:
    """Open a forward pass over one view of each row, and yield an iterator over its batches.

    The number of the view changes from row to row, so that all views of a teacher take part.
    """
    spec, device, stages = teacher.spec, torch.device(config.device), StageSeconds()
    work = DeviceWork(teacher, device, stages, events=events)
    # One view of each image, in turn.
    requests = [(row, (number % spec.views,)) for number, row in enumerate(rows)]
    unscanned = set(missing_shards(cache, IMAGES_UNIT))
    with (
        events.counting(f"{spec.name}, calibrating", len(rows)),
        device_streams(device) as num_streams,
        ThreadPoolExecutor(num_streams, thread_name_prefix="device") as streams,
    ):
        # As many images as the batches on the device need, and one for each thread that decodes.
        depth = (num_streams + 2) * config.batch_images + config.threads
        views = prefetch_views(cache, spec, requests, pool, stages, depth=depth, unscanned=unscanned, access=access)
        batches = (list(islice(views, config.batch_images)) for _ in range(0, len(rows), config.batch_images))
        with (
            contextlib.closing(views),
            contextlib.closing(prefetch_map(streams, work.features, batches, depth=num_streams + 1)) as map_batches,
        ):
            yield map_batches


@dataclass
class TeacherPass:
    """A teacher's pass over the shards that it lacks.

    Attributes:
        shards: shards that the pass makes.
        stages: seconds by stage, which the pass adds to.
        seconds: wall time, once the pass has ended.
    """

    shards: list[int]
    stages: StageSeconds
    seconds: float = 0.0


@contextlib.contextmanager
def teacher_pass(cache: Cache, name: str, events: BuildEvents) -> Generator[TeacherPass]:
    """Hold the lock of a registered teacher and report its pass while its missing shards are made in the block."""
    current = TeacherPass(missing_shards(cache, name), StageSeconds())
    # Shared with other builds of the teacher. `drop-teacher` refuses while it is held.
    with cache.storage.locked(unit_group(name), shared=True):
        started_s = time.perf_counter()
        with events.shard_pass(cache, name, current.shards, stages=current.stages):
            yield current
            compact_receipts(cache.storage, name)
            current.seconds = time.perf_counter() - started_s


__all__ = [
    "TeacherPass",
    "TeacherResult",
    "codec_sample",
    "register_teacher",
    "report_unusable_images",
    "retry_failures",
    "scan_images",
    "teacher_pass",
    "usable_sample",
]
