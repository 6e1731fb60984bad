"""The list of images that a cache keeps: keys, labels and locations, from the arguments of `--images`."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache_builder.sources.columns import SourceImages, joined_labels, sparse_numbers_named, without_empty_classes
from cache_builder.sources.file_list import list_file_list
from cache_builder.sources.folder import images_of_tree, listed_tree, walk_folder
from cache_builder.sources.images_option import Source, expand_source, prefixes, refuse_doubles, sources_at, with_member
from cache_builder.sources.listing_record import (
    REQUESTS_AT_ONCE,
    ListingRequest,
    Stamps,
    is_unchanged,
    never_trusted,
    record,
    stamps_of,
)
from cache_builder.sources.open_file import read_source
from cache_builder.sources.parquet import list_parquet
from cache_builder.sources.selection import Selection
from cache_builder.sources.webdataset import list_tar
from radio_cache.errors import ImageError, SourceError
from radio_cache.format.schema import CacheMeta, Container
from radio_cache.images.decode import EXTENSIONS
from radio_cache.images.remote import OnListed
from radio_cache.prefetch.ordered import prefetch_map
from radio_cache.reader import Cache
from radio_cache.storage.base import is_url
from radio_cache.terminal.output import CountLine
from radio_cache.writer import ImageIndex

_EVERYTHING = Selection()

_MAX_NOTES = 8
"""Limit of notes on all sources together. Thousands of tars have as many notes."""


@dataclass(frozen=True)
class Listing:
    """The images of a cache to be built, and what is recorded to recognise unchanged sources later."""

    index: ImageIndex
    containers: tuple[Container, ...]
    class_names: tuple[str, ...]

    notes: tuple[str, ...]
    """Messages for the user, such as numbers of skipped files and duplicate names."""

    stamps: Stamps = field(default_factory=dict[str, tuple[int, int]])
    """Last changes of all listed folders and files."""

    listed_at_ns: int = 0
    """Time before the first source was listed."""

    from_cache: bool = False
    """True if this is the list of an existing cache, whose sources are unchanged."""


def list_for(request: ListingRequest, cache: Cache | None, *, rescan: bool = False) -> Listing:
    """Return the images for a build: the cache's own list if its sources are unchanged, else a new one.

    Args:
        request: the sources and the selection of their images.
        cache: the cache that the build continues, None for a new one.
        rescan: list the sources even if they look unchanged.

    Raises:
        SourceError: as `list_images`.
    """
    with CountLine("listing the images", "files") as line:
        if cache is not None and not rescan and is_unchanged(cache, request):
            note = f"{cache.num_images} images, as listed when {cache.url} was made: nothing has changed since"
            return Listing(cache.index, cache.meta.containers, cache.meta.class_names, (note,), from_cache=True)
        return list_images(request.sources, selection=request.selection, member=request.member, on_listed=line.advance)


def record_listing(cache: Cache, request: ListingRequest, listing: Listing) -> None:
    """Record in a cache, which has these images now, the request and the stamps that a later build compares."""
    if not listing.from_cache:
        record(cache, request, listing.stamps, listed_at_ns=listing.listed_at_ns)


def list_images(
    sources: Sequence[str],
    *,
    selection: Selection = _EVERYTHING,
    member: str = "",
    on_listed: OnListed = lambda _: None,
) -> Listing:
    """List the images of folders, tars, Parquet files and lists in the order of the sources, sorted within a folder.

    An empty shard among others (of a folder, a pattern or a range) is skipped with a note.

    Args:
        sources: paths or URLs of folders of images, tars or Parquet files, of such files, and of text files that list images;
            glob patterns and WebDataset brace ranges (`train-{000..004}.tar`).
        selection: filters, order and limit of the images.
        member: extensions of the photos in tars (`jpg;png`), for tars that have none behind "#". Empty: all images.
        on_listed: called with the number of files as they are listed.

    Raises:
        SourceError: a source is missing, is of no known kind or holds no image, or no image is selected.
    """
    listed_at_ns = time.time_ns()
    # Grouped by argument: an argument that names only empty shards is an error, one empty shard among others is not.
    groups = [
        [source for path in expand_source(argument, on_listed) for source in sources_at(path, on_listed)]
        for argument in sources
    ]
    all_sources = [source for group in groups for source in group]
    if member:
        all_sources = with_member(all_sources, member)
    refuse_doubles(all_sources)
    containers: list[Container] = []
    listed: list[SourceImages] = []
    keys: list[str] = []
    notes: list[str] = []
    stamps: Stamps = {}
    empty: dict[str, str] = {}  # path of a source without images -> message
    results = _all_listed(all_sources, on_listed)
    for source, prefix, (images, source_stamps) in zip(all_sources, prefixes(all_sources), results, strict=True):
        if not images.members:
            detail = f": {images.notes[0]}" if images.notes else ""
            names = (
                f". Images are files whose names end in {' '.join(sorted(EXTENSIONS))}"
                if source.kind == "folder"
                else ""
            )
            empty[source.path] = f"{source.path} holds no image{detail}{names}"
        stamps |= source_stamps
        containers.append(
            Container(kind=images.kind or source.kind, path=source.path, prefix=prefix, column=images.column)
        )
        notes += [f"{source.path}: {note}" for note in images.notes if images.members]
        # Without a prefix the list itself is used: a million keys are not copied one by one.
        keys += [prefix + name for name in images.members] if prefix else images.members
        listed.append(images)
    notes += _empty_shards(groups, empty)
    if len(notes) > _MAX_NOTES:
        notes[_MAX_NOTES - 1 :] = [f"... and {len(notes) - _MAX_NOTES + 1} more such notes"]
    rows, num_passing = selection.rows(keys)
    notes += _selection_notes(selection, len(rows), num_passing, keys)
    # Labels are joined for all images first. Classes without a selected image are dropped below.
    labels, names = joined_labels(listed)
    labels = labels[rows]
    if (labels >= 0).any() and (unlabelled := np.flatnonzero(labels < 0)).size:
        notes.append(f"{unlabelled.size} of {len(rows)} images have no class (such as {keys[rows[unlabelled[0]]]})")
    if names is None:
        # Identifiers as class numbers would make every count by class allocate gigabytes.
        labels, names = sparse_numbers_named(labels)
        if names is not None:
            notes.append(
                f"class numbers go up to {names[-1]}, of {len(names)} classes: the numbers are kept as names of classes"
            )
    else:
        labels, names = without_empty_classes(labels, names)
    # (n,) the container of every listed image, before the selection.
    numbers = np.repeat(np.arange(len(listed), dtype=np.int32), [len(images.members) for images in listed])
    index = ImageIndex(
        # Unselected and unshuffled, the list of keys is used without a copy.
        keys=keys
        if len(rows) == len(keys) and selection.shuffle_seed is None
        else [keys[row] for row in rows.tolist()],
        labels=labels,
        container=numbers[rows],
        offset=np.concatenate([images.offset for images in listed])[rows],
        length=np.concatenate([images.length for images in listed])[rows],
    )
    return Listing(index, tuple(containers), names or (), tuple(notes), stamps, listed_at_ns)


def _empty_shards(groups: Sequence[Sequence[Source]], empty: Mapping[str, str]) -> list[str]:
    """Return a note on the shards without an image.

    Args:
        groups: the sources that each `--images` names.
        empty: path of a source without an image -> message about it.

    Raises:
        SourceError: all sources of one `--images` are empty.
    """
    for group in groups:
        if group and all(source.path in empty for source in group):
            raise SourceError(empty[group[0].path])
    if not empty:
        return []
    further = f", and so do {len(empty) - 1} more" if len(empty) > 1 else ""
    return [f"{next(iter(empty.values()))}{further}"]


def _all_listed(sources: Sequence[Source], on_listed: OnListed) -> Iterator[tuple[SourceImages, Stamps]]:
    """Yield the images of each source in order. Sources at URLs are listed in parallel."""
    if not any(is_url(source.path) for source in sources):
        yield from (_listed(source, on_listed) for source in sources)
        return
    # Listing a tar in a bucket waits for many small requests: threads overlap the waiting.
    with ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="list") as pool:
        yield from prefetch_map(pool, lambda source: _listed(source, on_listed), sources, depth=2 * REQUESTS_AT_ONCE)


def _listed(source: Source, on_listed: OnListed) -> tuple[SourceImages, Stamps]:
    """Return the images of one source, and the stamps of its folders and files.

    Stamps are taken before a file is read, so that a change during the reading is noticed by the next build.
    """
    path = source.path
    try:
        if source.kind == "folder":
            # The files of a bucket were listed with its prefix. A prefix has no time of change.
            if is_url(path):
                return images_of_tree(listed_tree(source.files)), {path: never_trusted()}
            tree = walk_folder(Path(path), on_listed)
            return images_of_tree(tree), {
                f"{path}/{below}" if below else path: (changed_ns, 0) for below, changed_ns in tree.folders.items()
            }
        stamps = stamps_of([path])
    except FileNotFoundError as exc:
        raise SourceError(f"{path} does not exist") from exc
    except ImageError as exc:  # the URL itself is invalid
        raise SourceError(f"{path} {exc}") from exc
    except OSError as exc:
        raise SourceError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    match source.kind:
        case "tar":
            # A tar reports its images one by one: at a URL each header may be a request.
            return list_tar(path, on_listed, member=source.image_column, class_field=source.label_column), stamps
        case "parquet":
            images = list_parquet(path, image=source.image_column, label=source.label_column)
        case "list":
            images = list_file_list(path, read_source(path), image=source.image_column, label=source.label_column)
    on_listed(len(images.members))
    return images, stamps


def _selection_notes(selection: Selection, num_used: int, num_passing: int, keys: Sequence[str]) -> list[str]:
    """Return notes on the effect of filters and limit.

    Raises:
        SourceError: no image passes the filters.
    """
    if num_passing == 0:
        raise SourceError(
            f"no image passes {' '.join(f'--filter {pattern!r}' for pattern in selection.filters)}: a pattern is compared with "
            f"the whole key, such as '{keys[0]}'"
        )
    notes: list[str] = []
    if selection.filters and num_passing < len(keys):
        notes.append(f"{num_passing} of {len(keys)} images pass the filters (--filter)")
    if num_used < num_passing:
        shuffled = "" if selection.shuffle_seed is None else ", shuffled,"
        notes.append(f"the first {num_used} of {num_passing} images{shuffled} are used (--limit)")
    return notes


def same_images(stored: ImageIndex, listed: ImageIndex) -> str | None:
    """Return the difference between a cache's list of images and a new listing in words; None if they are the same."""
    if stored.keys == listed.keys:
        if all((getattr(stored, column) == getattr(listed, column)).all() for column in ("labels", "offset", "length")):
            return None
        # The same keys in the same order: only the other columns can differ.
        return "the same images with other labels or at other offsets in their tars"
    old, new = set(stored.keys), set(listed.keys)
    added, removed = sorted(new - old), sorted(old - new)
    if not added and not removed:
        return "the same images in another order"
    parts: list[str] = []
    if added:
        parts.append(f"{len(added)} new image{'s' if len(added) > 1 else ''} (such as {added[0]})")
    if removed:
        parts.append(f"{len(removed)} missing (such as {removed[0]})")
    return " and ".join(parts)


def begins_with(listing: Listing, stored: ImageIndex, meta: CacheMeta) -> bool:
    """Return whether a listing is a cache's list of images followed by new ones.

    No image may have been moved, renamed or put into another class.
    """
    num_stored, index = len(stored), listing.index
    if len(index) <= num_stored or listing.containers[: len(meta.containers)] != meta.containers:
        return False
    columns = ("container", "offset", "length")
    # Rows of a cache are positions: a build can append images, but not insert them.
    return (
        index.keys[:num_stored] == [*stored.keys]
        and all(np.array_equal(getattr(index, name)[:num_stored], getattr(stored, name)) for name in columns)
        and _classes(index.labels[:num_stored], listing.class_names) == _classes(stored.labels, meta.class_names)
    )


def with_recorded_prefixes(listing: Listing, meta: CacheMeta) -> Listing:
    """Return the listing with the key prefixes that a cache has for its containers.

    A key begins with the path of its container below the folder that all containers share. So it changes when a container is
    renamed or another one is added, although the images are the same. The listing is returned unchanged if its containers are
    of other kinds, or if two images would get the same key.
    """
    stored, current = meta.containers, listing.containers
    # Containers behind those of the cache are new, and keep their own prefixes.
    prefixes = [old.prefix for old in stored] + [new.prefix for new in current[len(stored) :]]
    if len(current) < len(stored) or prefixes == [new.prefix for new in current]:
        return listing
    if [(old.kind, old.column) for old in stored] != [(new.kind, new.column) for new in current[: len(stored)]]:
        return listing
    index = listing.index
    keys = [
        prefixes[number] + key.removeprefix(current[number].prefix)
        for key, number in zip(index.keys, index.container.tolist(), strict=True)
    ]
    # An old prefix may be that of a new container.
    if len(set(keys)) < len(keys):
        return listing
    containers = tuple(replace(new, prefix=prefix) for new, prefix in zip(current, prefixes, strict=True))
    index = ImageIndex(
        keys=keys, labels=index.labels, container=index.container, offset=index.offset, length=index.length
    )
    return replace(listing, index=index, containers=containers)


def _classes(labels: NDArray[np.int32], names: tuple[str, ...]) -> list[str | int]:
    """Return the class names of labels: numbers shift when a class is added. A number without a name stays."""
    return [names[label] if 0 <= label < len(names) else label for label in labels.tolist()]


__all__ = ["Listing", "begins_with", "list_images", "same_images", "with_recorded_prefixes"]
