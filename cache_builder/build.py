"""Stage 1: run the teachers once over the images and write their features to a cache."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from cache_builder.build_config import BuildConfig
from cache_builder.build_output import (
    check_same,
    create_or_open,
    extend_cache,
    missing_shards,
    open_cache,
    tolerate_concurrent_creation,
    with_recorded_loading,
)
from cache_builder.computed_with import notes_on_rest, recorded_batch, refuse_other_batch, with_recorded_batch
from cache_builder.pipeline.batch_size import resolve_batch_size, resolve_shared_batch_size
from cache_builder.pipeline.events import BuildEvents, ReportedEvents
from cache_builder.pipeline.image_access import ImageAccess
from cache_builder.pipeline.passes import (
    TeacherResult,
    codec_sample,
    register_teacher,
    report_unusable_images,
    retry_failures,
    scan_images,
    teacher_pass,
)
from cache_builder.pipeline.shards import run_shards
from cache_builder.sources import Listing, list_for, record_listing
from cache_builder.sources.listing import with_recorded_prefixes
from cache_builder.teachers import find_teacher, find_weights, load_teacher_file
from cache_builder.teachers.base import Teacher
from cache_builder.workers.pool import WorkerPool
from radio_cache.checks.presence import CheckedFiles, refuse_missing_files
from radio_cache.format.schema import IMAGES_UNIT, TeacherSpec
from radio_cache.reader import Cache, is_cache
from radio_cache.writer import refuse_occupied


@dataclass(frozen=True)
class BuildReport:
    """Result of a build.

    Attributes:
        cache: the cache, opened after the build.
        notes: sentences about the list of images.
        results: one per teacher, in the order of the configuration.
        unusable: images that cannot be used, over the whole cache.
        there: files of the teachers, whose names and sizes were compared with the receipts at the end.
        unreadable: those of the unusable images that could not be read, and may be fine.
        is_complete: whether these are few, or the build was to leave them out.
    """

    cache: Cache
    notes: tuple[str, ...]
    results: tuple[TeacherResult, ...]
    unusable: int
    there: CheckedFiles
    unreadable: int = 0
    is_complete: bool = True


FEW_UNREADABLE = 3
"""Unreadable images, or 1 % of all, whichever is more: a build that lacks more than that is not complete."""


def build_cache(
    config: BuildConfig, events: BuildEvents | None = None, worker_pool: WorkerPool | None = None
) -> BuildReport:
    """Build a cache, or continue one. A second call with the same configuration makes only what is missing.

    Args:
        config: what to build, and where.
        events: receives messages and progress. By default progress lines go to standard error, messages nowhere, and
            `config.log_json` is written.
        worker_pool: worker processes that do the work instead of this one.

    Raises:
        ConfigError, SourceError, TeacherError, NotACacheError, StaleCacheError: before any work is done.
        CorruptShardError: at the end, if files of shards from earlier builds are gone.
    """
    events = events or ReportedEvents(log_json=config.log_json)
    existing = Cache(config.out) if is_cache(config.out) else None
    config = with_recorded_loading(config, existing)
    teachers = _TeacherLoader(config)  # finds the weights, before sources are listed
    listing = list_for(config.request(), existing, rescan=config.rescan)
    if existing is not None:
        listing = with_recorded_prefixes(listing, existing.meta)
    for note in listing.notes:
        events.message(note)
    cache = None if existing is None else open_cache(config, listing)
    # Images are identified by digests, so a moved folder is no error, but worth a message.
    if existing is not None and cache is not None:
        _report_moved_images(existing, cache, events)
    if cache is None:
        # Before teachers are loaded: an occupied folder must not surface after minutes.
        with tolerate_concurrent_creation(config.out):
            refuse_occupied(config.out)

    # Every weights file is read as a whole before the first teacher runs, so that a wrong one does not surface after hours.
    # One teacher at a time is in memory: the first one stays, the others are loaded again when it is their turn.
    first, *others = config.groups
    for name in (*others, first):
        teachers.load(name)
    specs = [teachers.specs[name] for name in config.groups]
    for spec in specs:
        for note in teachers.notes[spec.name]:
            events.message(f"{spec.name}: {note}")
    cache = cache or create_or_open(config, listing)
    check_same(cache, specs)
    # Before the cache is extended, so that a refused command changes nothing.
    refuse_other_batch(cache, config, len(listing.index))
    for spec in specs:
        for note in notes_on_rest(cache, spec, config, len(listing.index), elsewhere=worker_pool is not None):
            events.message(f"{spec.name}: {note}")
    shared_config = config
    if worker_pool is not None:
        begun = all(recorded_batch(cache, name) for name in config.groups)
        # Workers cannot measure: each might find another size.
        shared_config = resolve_shared_batch_size(config, begun=begun)
    cache = extend_cache(cache, listing, events.message)
    record_listing(cache, config.request(), listing)
    with ThreadPoolExecutor(config.threads, thread_name_prefix="decode") as pool:
        # With `leave_out`: images that still cannot be read are no error here.
        if retry_failures(cache, config, pool, ImageAccess(cache, leave_out=True), events):
            cache = cache.reopened()
    if worker_pool is not None:
        teachers.unload()  # they have been checked; the workers load their own
        return _report(config, listing, worker_pool.build(cache, shared_config, events))

    results: list[TeacherResult] = []
    access = ImageAccess(cache, leave_out=config.leave_out_unreadable)
    with ThreadPoolExecutor(config.threads, thread_name_prefix="decode") as pool:
        if not missing_shards(cache, IMAGES_UNIT):
            report_unusable_images(cache, events)
        for name in config.groups:
            teacher = teachers.load(name)
            teacher.to(torch.device(config.device))
            # The recorded size of a begun teacher comes first; "auto" measures only for a new one.
            sized = resolve_batch_size(with_recorded_batch(config, cache, name), teacher, events.message)
            if name not in cache.teachers:
                sample_access = ImageAccess(cache, leave_out=config.leave_out_unreadable)
                sample = codec_sample(cache, teacher.spec, sized, pool, sample_access)
                # Too few of the tried images are usable: a scan of all has to find out which are.
                if sample is None:
                    scan_images(cache, pool, events, access=access)
                    cache = cache.reopened()
                    sample = codec_sample(cache, teacher.spec, sized, pool, sample_access) or []
                register_teacher(cache, teacher, sample, sized, pool, events, sample_access)
            # Another process may have been faster to register the teacher: its codec and its batch size count.
            cache = cache.reopened()
            check_same(cache, [teacher.spec])
            sized = _with_batch_of_other_build(sized, cache, name, events)
            todo, unscanned = set(missing_shards(cache, name)), set(missing_shards(cache, IMAGES_UNIT))
            # Shards that the teacher has already, but the scan has not, get a scan of their own.
            if not unscanned <= todo:
                scan_images(cache, pool, events, skip=todo, access=access)
            with teacher_pass(cache, name, events) as current:
                shards = run_shards(cache, teacher, current.shards, sized, pool, current.stages, events, access)
                with closing(shards):
                    for _ in shards:
                        events.progress(0)  # the images are counted already, the bytes of the shard are not
            cache = cache.reopened()
            if unscanned & todo:
                report_unusable_images(cache, events)
            usable_rows = cache.usable_rows()
            images = int(np.isin(usable_rows // cache.meta.shard_images, current.shards).sum())
            before = len(usable_rows) - images
            results.append(TeacherResult(name, images, before, current.seconds, current.stages))
            del teacher, shards  # they hold the teacher, and the next one may not fit beside it
            teachers.unload()
    return _report(config, listing, results)


class _TeacherLoader:
    """Teachers of a configuration, of which one at a time is in memory."""

    def __init__(self, config: BuildConfig) -> None:
        self._groups = config.groups
        self._weights = {
            name: find_weights(find_teacher(preset), options.weights)
            for name, (preset, options) in self._groups.items()
        }
        self._name, self._teacher = "", None
        self.specs: dict[str, TeacherSpec] = {}
        self.notes: dict[str, tuple[str, ...]] = {}

    def load(self, name: str) -> Teacher:
        """Return the teacher of a group, read from its file unless it is the one in memory."""
        if self._teacher is None or self._name != name:
            self.unload()
            preset, options = self._groups[name]
            self._name, self._teacher = name, load_teacher_file(preset, self._weights[name], options)
            self.specs[name], self.notes[name] = self._teacher.spec, self._teacher.notes
        return self._teacher

    def unload(self) -> None:
        """Free the memory of the loaded teacher."""
        self._teacher = None


def _report_moved_images(before: Cache, cache: Cache, events: BuildEvents) -> None:
    old_containers, new_containers = before.meta.containers, cache.meta.containers
    if len(old_containers) > len(new_containers):
        return
    moves = [(old, new) for old, new in zip(old_containers, new_containers, strict=False) if old != new]
    if moves:
        old, new = moves[0]
        events.message(f"{cache.url}: the same images, by their digests, are in {new.path} now (before: {old.path})")


def _with_batch_of_other_build(config: BuildConfig, cache: Cache, name: str, events: BuildEvents) -> BuildConfig:
    recorded = with_recorded_batch(config, cache, name)
    if recorded.batch_images != config.batch_images:
        events.message(f"{name}: batches of {recorded.batch_images} images, as another build has just begun it with")
    return recorded


def _report(config: BuildConfig, listing: Listing, results: list[TeacherResult]) -> BuildReport:
    cache = Cache(config.out)
    files = refuse_missing_files(cache, [IMAGES_UNIT, *config.groups])
    failures = cache.failures()
    unreadable = [failure for failure in failures if failure.is_unreadable]
    # A few unreadable files are usual in a large collection.
    are_few = len(unreadable) <= max(FEW_UNREADABLE, cache.num_images // 100)
    return BuildReport(
        cache,
        listing.notes,
        tuple(results),
        len(failures),
        files,
        unreadable=len(unreadable),
        is_complete=are_few or config.leave_out_unreadable,
    )


__all__ = ["BuildConfig", "BuildReport", "TeacherResult", "build_cache"]
