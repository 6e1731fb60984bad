"""New places of a cache's images. Images are identified by their digests, not by their paths."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cache_builder.sources.images_option import expand_source, sources_at
from cache_builder.sources.listing_record import record_moved_sources
from radio_cache.errors import ConfigError, ImageError, StaleCacheError
from radio_cache.format.documents import root_document
from radio_cache.format.schema import Container
from radio_cache.format.zarr_json import DOCUMENT
from radio_cache.images.containers import read_image
from radio_cache.reader import Cache, digest

COMPARED_IMAGES = 64
"""Images whose digests are compared, spread over the cache; a build compares every image that it reads."""


def relocate(cache: Cache, sources: Sequence[str]) -> Cache:
    """Have the cache read its images from other places, in the order of `--images` as it was built.

    Args:
        cache: the cache.
        sources: folders, tars, Parquet files, lists or patterns, as `radio-cache build --images` takes them.

    Raises:
        ConfigError: there are more or fewer places than the cache has, or of another kind; or the cache knows no image yet by
            which to recognise them.
        StaleCacheError: an image there is another one, or is not there; nothing is changed.
    """
    places = [source for typed in sources for place in expand_source(typed) for source in sources_at(place)]
    then = cache.meta.containers
    # A Parquet file that lists files is a list to the cache.
    kinds = [
        "list" if old.kind == "list" and new.kind == "parquet" else new.kind
        for old, new in zip(then, places, strict=False)
    ]
    if len(places) != len(then) or kinds != [container.kind for container in then]:
        raise ConfigError(
            f"{cache.url} has its images in {_named(then)}, and --images names {len(places)} "
            f"{places[0].kind if places else 'place'}{'s' * (len(places) != 1)}: name as many of the same kind, in the same order"
        )
    if not len(cache.usable_rows()):
        raise ConfigError(
            f"{cache.url} knows no image yet by which those of {sources[0]} could be recognised: run `radio-cache build` with "
            "--images where they are now, which looks at each"
        )
    moved = moved_to(cache, [replace(old, path=new.path) for old, new in zip(then, places, strict=True)])
    record_moved_sources(moved, sources)
    return moved


def moved_to(cache: Cache, containers: Sequence[Container]) -> Cache:
    """Record other containers of the same images, after a sample of them was compared.

    Raises:
        StaleCacheError: an image of the sample differs, or is missing.
    """
    usable = cache.usable_rows()
    # Spread over all rows, so that a container that was swapped for another is noticed.
    spread = np.linspace(0, len(usable) - 1, min(COMPARED_IMAGES, len(usable))).astype(int)
    index = cache.index
    for row in usable[spread].tolist():
        key, container = index.key(row), containers[int(index.container[row])]
        reason = "it is another file than the one that the teachers saw"
        try:
            data = read_image(container, key, int(index.offset[row]), int(index.length[row]))
        except ImageError as exc:
            data, reason = b"", str(exc)
        if digest(data) != cache.digests[row].tobytes():
            raise StaleCacheError(
                f"{cache.url}: image {key} is not the same in {container.path} (before in "
                f"{cache.meta.containers[int(index.container[row])].path}): {reason}. Nothing was changed: name the place where "
                "the same images are"
            )
    # Last: until here nothing has changed.
    cache.storage.write(DOCUMENT, [root_document(replace(cache.meta, containers=tuple(containers)))])
    return cache.reopened()


def are_same_but_for_path(then: Sequence[Container], now: Sequence[Container]) -> bool:
    """Return whether containers differ in nothing but where they lie."""
    return len(then) == len(now) and all(replace(new, path=old.path) == old for old, new in zip(then, now, strict=True))


def _named(containers: Sequence[Container]) -> str:
    kinds = sorted({container.kind for container in containers})
    return f"{len(containers)} {'/'.join(kinds)}{'s' * (len(containers) != 1)} (such as {containers[0].path})"


__all__ = ["COMPARED_IMAGES", "are_same_but_for_path", "moved_to", "relocate"]
