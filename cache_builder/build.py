"""Stage 1: run the teachers once over the images, and keep what they say.

`build_cache` is the whole; `build_shard` is the unit of work: an ordinary function that writes one shard of one teacher,
may run twice with the same result, and returns a receipt.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from cache_builder.build_config import BuildConfig
from cache_builder.build_output import (
    OnMessage,
    check_same,
    create,
    extend_cache,
    open_cache,
    unless_another_was_faster,
    with_recorded_loading,
)
from cache_builder.computed_with import notes_on_rest, recorded_batch, refuse_other_batch, with_recorded_batch
from cache_builder.pipeline.batch_size import resolve_batch_size, resolve_shared_batch_size
from cache_builder.pipeline.image_access import ImageAccess
from cache_builder.pipeline.log import BuildLog
from cache_builder.pipeline.passes import (
    TeacherResult,
    missing_shards,
    register_teacher,
    report_unusable_images,
    retry_failures,
    run_teacher,
    scan_images,
)
from cache_builder.sources import Listing, list_for, record_listing
from cache_builder.sources.listing import with_recorded_prefixes
from cache_builder.teachers import find_teacher, find_weights, load_teacher_file
from cache_builder.teachers.base import Teacher
from cache_builder.workers.pool import WorkerPool
from cache_builder.workers.worker import ShardTask, build_shard
from radio_cache.checks.presence import FilesThere, refuse_missing_files
from radio_cache.format.schema import IMAGES_UNIT, TeacherSpec, unit_group
from radio_cache.reader import Cache, is_cache
from radio_cache.writer import refuse_occupied


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    unusable: images that could not be used, over the whole cache. there: the files of its teachers, whose names and sizes were
    looked at when all was done. unreadable: those of the unusable images that could not be read, and may be fine. is_complete:
    whether they are few, or the build was told to leave them out.
    """

    cache: Cache
    notes: tuple[str, ...]
    results: tuple[TeacherResult, ...]
    unusable: int
    there: FilesThere
    unreadable: int = 0
    is_complete: bool = True


FEW_UNREADABLE = 3
"""Images that could not be read, or 1 % of all: a build that lacks more is not complete."""


def build_cache(
    config: BuildConfig, say: OnMessage = lambda _: None, worker_pool: WorkerPool | None = None
) -> BuildReport:
    """Build a cache, or go on with one that was interrupted. The same command again does only what is missing.

    say: told one sentence at a time about what is going on. crew: worker processes that do the work instead of this one.
    Raises ConfigError, SourceError, TeacherError, NotACacheError or StaleCacheError before any work is done;
    CorruptShardError after it, if files of shards that were made before are gone.
    """
    log = BuildLog(config.log_json)
    there = Cache(config.out) if is_cache(config.out) else None
    config = with_recorded_loading(config, there)
    groups = config.groups
    weights = {name: find_weights(find_teacher(of), options.weights) for name, (of, options) in groups.items()}
    listing = list_for(config.request(), there, rescan=config.rescan)
    if there is not None:
        listing = with_recorded_prefixes(listing, there.meta)
    for note in listing.notes:
        say(note)
    cache = open_cache(config, listing) if there is not None else None
    if there is not None and cache is not None and len(there.meta.containers) <= len(cache.meta.containers):
        moves = [
            (old, new) for old, new in zip(there.meta.containers, cache.meta.containers, strict=False) if old != new
        ]
        if moves:
            say(
                f"{cache.url}: the same images, by their digests, are in {moves[0][1].path} now (before: {moves[0][0].path})"
            )
    if cache is None:
        with unless_another_was_faster(config.out):
            refuse_occupied(config.out)

    def load(name: str) -> Teacher:
        of, options = groups[name]
        return load_teacher_file(of, weights[name], options)

    # Every file is read as a whole before the first teacher runs, so that a wrong one does not surface after hours; but one
    # teacher at a time is in memory. The first one stays, the others are loaded again when it is their turn.
    first, *others = groups
    known = {name: _known(load(name)) for name in others}
    teacher: Teacher | None = load(first)
    known = {first: _known(teacher)} | known
    for spec, notes in known.values():
        for note in notes:
            say(f"{spec.name}: {note}")
    cache = cache or create(config, listing)
    check_same(cache, [spec for spec, _ in known.values()])
    refuse_other_batch(cache, config, len(listing.index))
    for spec, _ in known.values():
        for note in notes_on_rest(cache, spec, config, len(listing.index), elsewhere=worker_pool is not None):
            say(f"{spec.name}: {note}")
    shared = config
    if worker_pool is not None:
        shared = resolve_shared_batch_size(config, begun=all(recorded_batch(cache, name) for name in groups))
    cache = extend_cache(cache, listing, say)
    record_listing(cache, config.request(), listing)
    results: list[TeacherResult] = []
    with ThreadPoolExecutor(config.threads, thread_name_prefix="decode") as pool:
        cache = retry_failures(cache, config, pool, ImageAccess(cache, leave_out=True), say)
    if worker_pool is not None:
        del teacher  # it has been checked; the workers load their own
        results = worker_pool.build(cache, shared, say, log)
        return _report(config, listing, results)
    access = ImageAccess(cache, leave_out=config.leave_out_unreadable)
    with ThreadPoolExecutor(config.threads, thread_name_prefix="decode") as pool:
        if not missing_shards(cache, IMAGES_UNIT):
            report_unusable_images(cache, say)

        def scan(cache: Cache = cache) -> None:
            scan_images(cache, pool, say, log, access=access)

        for name in groups:
            if teacher is None:
                teacher = load(name)
            teacher.to(torch.device(config.device))
            sized = with_recorded_batch(config, cache, name)
            sized = resolve_batch_size(sized, teacher, say)
            cache = register_teacher(cache, teacher, sized, pool, say, scan)
            # Another process may have been faster to make the teacher, in batches of another size.
            taken = with_recorded_batch(sized, cache, name)
            if taken.batch != sized.batch:
                say(f"{name}: batches of {taken.batch} images, as another build has just begun it with")
            sized = taken
            with cache.storage.locked(unit_group(name), shared=True):
                results.append(run_teacher(cache, teacher, sized, pool, say, log, access))
            teacher = None
    return _report(config, listing, results)


def _known(teacher: Teacher) -> tuple[TeacherSpec, tuple[str, ...]]:
    return teacher.spec, teacher.notes


def _report(config: BuildConfig, listing: Listing, results: list[TeacherResult]) -> BuildReport:
    cache = Cache(config.out)
    there = refuse_missing_files(cache, [IMAGES_UNIT, *config.groups])
    failures = cache.failures()
    unreadable = [failure for failure in failures if failure.is_unreadable]
    few = len(unreadable) <= max(FEW_UNREADABLE, cache.num_images // 100)
    return BuildReport(
        cache,
        listing.notes,
        tuple(results),
        len(failures),
        there,
        unreadable=len(unreadable),
        is_complete=few or config.leave_out_unreadable,
    )


__all__ = ["BuildConfig", "BuildReport", "ShardTask", "TeacherResult", "build_cache", "build_shard"]
