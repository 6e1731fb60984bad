"""The cache a build writes to: made, opened, made longer, or refused."""

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
"""Told one sentence at a time about what is going on."""


def open_cache(config: BuildConfig, listing: Listing) -> Cache:
    """The cache that is there. Raises StaleCacheError if it was made neither from these images in this way, nor from
    the first of them. Images that were only moved are recognised, and the cache notes where they are now."""
    cache = Cache(config.out)
    cache.storage.remove_leftovers()
    meta = cache.meta
    cure = "choose another --out"
    if (places := _places_of_moved(listing, cache)) is not None:
        cache = moved_to(cache, places)
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
    for name, then, now in (
        ("--shard-images", meta.shard_images, config.shard_images),
        ("--max-pixels", meta.max_pixels, config.max_pixels),
        # Whoever does not ask for pixels takes what is there.
        ("--store-pixels", meta.pixels or "nothing", config.pixels or meta.pixels or "nothing"),
    ):
        if then != now:
            raise StaleCacheError(
                f"{config.out} was built with {name} {then}, this run asks for {now}: ask for {then}, {cure}"
            )
    return cache


def _places_of_moved(listing: Listing, cache: Cache) -> tuple[Container, ...] | None:
    """Return where a cache's images are now, if a listing names all of them at other places, in order, and then more images."""
    meta = cache.meta
    then = meta.containers
    now = listing.containers[: len(then)]
    if listing.from_cache or now == then or not are_same_but_for_path(then, now):
        return None
    as_before = replace(listing, containers=then + listing.containers[len(then) :])
    return now if begins_with(as_before, cache.index, meta) else None


def create_or_open(config: BuildConfig, listing: Listing) -> Cache:
    """A new cache of these images, or the one that another process made a moment ago."""
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
    """That the place is taken is no error if it holds a cache now: another build made it a moment ago."""
    try:
        yield
    except NotACacheError:
        if not is_cache(out):
            raise


def with_recorded_loading(config: BuildConfig, cache: Cache | None) -> BuildConfig:
    """Have teachers of a cache made before specs said what was loaded be loaded as they were, so that shards stay of one kind."""
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
    lacking = shards_lacking_rows(columns, cache.receipt_columns(IMAGES_UNIT), meta.shard_images)
    return sorted({*missing, *lacking})


def check_same(cache: Cache, specs: Sequence[TeacherSpec]) -> None:
    """Raise StaleCacheError if the cache holds one of these teachers, and built in another way."""
    for asked in specs:
        if asked.name not in cache.teachers:
            refuse_remains(cache.storage, asked.name)
            continue
        there = cache.teachers[asked.name].spec
        if (COMPILED in there.software) != (COMPILED in asked.software):
            then, now = ("with", "without") if COMPILED in there.software else ("without", "with")
            raise StaleCacheError(
                f"{cache.url}, teacher '{asked.name}' was built {then} --compile, and this run is {now} it: compiled kernels "
                f"round otherwise, so its shards would not be of one kind. Run {then} --compile, or build into another --out"
            )
        differences = there.differences(asked)
        if differences:
            sizes = there.geometry.input_hw[0], asked.geometry.input_hw[0]
            beside = f", or keep both sizes: --size {sizes[0]} --size {sizes[1]}" if sizes[0] != sizes[1] else ""
            raise StaleCacheError(
                f"{cache.url}, teacher '{asked.name}': {'; '.join(differences)}. "
                f"Ask for what the cache holds, or build into another --out{beside}"
            )
