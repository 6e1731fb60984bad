"""The cache that a build writes to: create, open, extend or refuse it."""

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path

from cache_builder.build_config import BuildConfig
from cache_builder.relocate import are_same_but_for_path, moved_to
from cache_builder.sources import Listing
from cache_builder.sources.listing import begins_with, same_images
from cache_builder.sources.listing_record import is_listed_by_older_version, selection_changes
from cache_builder.teachers import cache_group
from cache_builder.teachers.preset import COMPILED
from radio_cache import __version__
from radio_cache.errors import NotACacheError, StaleCacheError
from radio_cache.format.schema import IMAGES_UNIT, CacheMeta, Container, TeacherSpec
from radio_cache.reader import Cache, is_cache
from radio_cache.receipts import shards_lacking_rows, unfinished_shards
from radio_cache.writer import create_cache, grow_cache, refuse_remains

OnMessage = Callable[[str], None]
"""Receives one sentence at a time about the state of a build."""


def open_cache(config: BuildConfig, listing: Listing) -> Cache:
    """Return the existing cache, with its images' containers updated if they were only moved.

    Raises:
        StaleCacheError: it was built neither from the images of the listing nor from the first of them, or in another way.
    """
    cache = Cache(config.out)
    # Files of a process that was killed while it wrote.
    cache.storage.remove_leftovers()
    meta = cache.meta
    cure = "choose another --out"
    # Before the comparison below, which would find other images at the old paths.
    if (containers := _moved_containers(listing, cache)) is not None:
        cache = moved_to(cache, containers)
        meta = cache.meta
    grows = begins_with(listing, cache.index, meta)
    difference = None if grows or listing.from_cache else same_images(cache.index, listing.index)
    if difference is None and not grows and meta.containers != listing.containers:
        if are_same_but_for_path(meta.containers, listing.containers):
            cache = moved_to(cache, listing.containers)
            meta = cache.meta
        else:
            difference = f"the same images elsewhere (then {meta.containers[0].path}, now {listing.containers[0].path})"
    if difference is not None:
        changes = selection_changes(cache, config.request())
        back = (
            "mount or put back what is missing, or " if difference.endswith(")") and " missing (" in difference else ""
        )
        cause = (
            f". {'; '.join(changes)}: give the same as then, {cure}" if changes else f". {(back + cure).capitalize()}"
        )
        if is_listed_by_older_version(cache):
            cause = (
                f". An earlier radio-cache listed it, and took some classes and places otherwise (CHANGELOG.md){cause}"
            )
        raise StaleCacheError(
            f"{config.out} was built from other images than this run asks for: now there are {difference}{cause}"
        )
    for option, recorded_value, requested_value in (
        ("--shard-images", meta.shard_images, config.shard_images),
        ("--max-pixels", meta.max_pixels, config.max_pixels),
        # Without --store-pixels a build takes what the cache has.
        ("--store-pixels", meta.pixels or "nothing", config.pixels or meta.pixels or "nothing"),
    ):
        if recorded_value != requested_value:
            raise StaleCacheError(
                f"{config.out} was built with {option} {recorded_value}, this run asks for {requested_value}: ask for "
                f"{recorded_value}, {cure}"
            )
    return cache


def _moved_containers(listing: Listing, cache: Cache) -> tuple[Container, ...] | None:
    """Return the new containers of a cache's images, if a listing names all of them elsewhere, in order, and then more."""
    meta = cache.meta
    then = meta.containers
    now = listing.containers[: len(then)]
    if listing.from_cache or now == then or not are_same_but_for_path(then, now):
        return None
    as_before = replace(listing, containers=then + listing.containers[len(then) :])
    return now if begins_with(as_before, cache.index, meta) else None


def create_or_open(config: BuildConfig, listing: Listing) -> Cache:
    """Create a cache of these images, or open the one that another process has just created."""
    meta = CacheMeta(
        num_images=len(listing.index.keys),
        shard_images=config.shard_images,
        creator=f"radio-cache {__version__}",
        containers=listing.containers,
        class_names=listing.class_names,
        max_pixels=config.max_pixels,
        pixels=config.pixels,
    )
    with tolerate_concurrent_creation(config.out):
        create_cache(config.out, meta, listing.index)
    return open_cache(config, listing)


@contextlib.contextmanager
def tolerate_concurrent_creation(out: str | Path) -> Generator[None]:
    """Ignore NotACacheError if there is a cache by now, because another build has just created it."""
    try:
        yield
    except NotACacheError:
        if not is_cache(out):
            raise


def with_recorded_loading(config: BuildConfig, cache: Cache | None) -> BuildConfig:
    """Return the configuration with teachers loaded as the cache's earlier shards were.

    Specs of old caches do not record what was loaded. Their teachers are loaded by the rules of that time, so that all shards
    of a teacher agree.
    """
    if cache is None:
        return config
    before = {name for name, teacher in cache.teachers.items() if not teacher.spec.loaded}
    teachers = {
        name: replace(options, legacy_loading=True) if cache_group(name, options) in before else options
        for name, options in config.teachers.items()
    }
    return replace(config, teachers=teachers)


def extend_cache(cache: Cache, listing: Listing, on_message: OnMessage) -> Cache:
    """Return the cache, with the images appended that the listing has beyond its end."""
    meta = cache.meta
    if not begins_with(listing, cache.index, meta):
        return cache
    longer = replace(
        meta, num_images=len(listing.index), containers=listing.containers, class_names=listing.class_names
    )
    grow_cache(cache.storage, longer, listing.index)
    num_new = longer.num_images - meta.num_images
    on_message(f"{cache.url}: {num_new} images are added to the {meta.num_images} that are there")
    return cache.reopened()


def missing_shards(cache: Cache, unit: str) -> list[int]:
    """Return the shards of a unit that a build has to make.

    These include shards of a teacher that lack an image which can be used by now.
    """
    meta, columns = cache.meta, cache.receipt_columns(unit)
    missing = unfinished_shards(columns, meta.shard_rows, meta.num_shards)
    if unit == IMAGES_UNIT or not len(columns.failed_rows):
        return missing
    # An image that has become readable is missing in a shard that counts as finished.
    lacking = shards_lacking_rows(columns, cache.receipt_columns(IMAGES_UNIT), meta.shard_images)
    return sorted({*missing, *lacking})


def check_same(cache: Cache, specs: Sequence[TeacherSpec]) -> None:
    """Raise StaleCacheError if the cache holds one of these teachers, and built in another way."""
    for requested in specs:
        if requested.name not in cache.teachers:
            refuse_remains(cache.storage, requested.name)
            continue
        cached = cache.teachers[requested.name].spec
        if (COMPILED in cached.software) != (COMPILED in requested.software):
            then, now = ("with", "without") if COMPILED in cached.software else ("without", "with")
            raise StaleCacheError(
                f"{cache.url}, teacher '{requested.name}' was built {then} --compile, and this run is {now} it: compiled kernels "
                f"round otherwise, so its shards would not be of one kind. Run {then} --compile, or build into another --out"
            )
        differences = cached.differences(requested)
        if differences:
            sizes = cached.geometry.input_hw[0], requested.geometry.input_hw[0]
            beside = f", or keep both sizes: --size {sizes[0]} --size {sizes[1]}" if sizes[0] != sizes[1] else ""
            raise StaleCacheError(
                f"{cache.url}, teacher '{requested.name}': {'; '.join(differences)}. "
                f"Ask for what the cache holds, or build into another --out{beside}"
            )
