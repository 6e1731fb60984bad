"""From `--images` to the list of images that a cache keeps: keys, labels and places."""

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
from radio_cache.prefetch.ordered import ahead
from radio_cache.reader import Cache
from radio_cache.storage.base import is_url
from radio_cache.terminal.output import CountLine
from radio_cache.writer import ImageIndex

_EVERYTHING = Selection()

_MAX_NOTES = 8
"""About all sources together: thousands of tars have as many notes."""


@dataclass(frozen=True)
class Listing:
    """What a cache will be made of. notes: sentences a user should see (files passed over, names that came twice).

    stamps: when everything that was looked at, from listed_at_ns on, was changed last. from_cache: whether the list is the
    cache's own.
    """

    index: ImageIndex
    containers: tuple[Container, ...]
    class_names: tuple[str, ...]
    notes: tuple[str, ...]
    stamps: Stamps = field(default_factory=dict[str, tuple[int, int]])
    listed_at_ns: int = 0
    from_cache: bool = False


def list_for(request: ListingRequest, cache: Cache | None, *, rescan: bool = False) -> Listing:
    """The images that a build is to use: the cache's own list if the sources look unchanged since it was made.

    rescan: list the sources in any case. Raises SourceError as `list_images` does.
    """
    with CountLine("listing the images", "files") as line:
        if cache is not None and not rescan and is_unchanged(cache, request):
            note = f"{cache.num_images} images, as listed when {cache.url} was made: nothing has changed since"
            return Listing(cache.index, cache.meta.containers, cache.meta.class_names, (note,), from_cache=True)
        return list_images(request.sources, selection=request.selection, member=request.member, tell=line.advance)


def record_listing(cache: Cache, request: ListingRequest, listing: Listing) -> None:
    """Note in a cache, which has these images now, what to look at to know that nothing has changed."""
    if not listing.from_cache:
        record(cache, request, listing.stamps, listed_at_ns=listing.listed_at_ns)


def list_images(
    sources: Sequence[str], *, selection: Selection = _EVERYTHING, member: str = "", tell: OnListed = lambda _: None
) -> Listing:
    """List the images of folders, tars, Parquet files and lists, in the order given, sorted within a folder.

    sources: folders of images, of tars or of Parquet files, such files, glob patterns and WebDataset brace ranges
        (`train-{000..004}.tar`), text files that list images; paths or URLs. selection: which of them, in what order.
    member: which member of a sample in a tar is the photo (`jpg;png`), where its source does not say; all images if empty.
    tell: told of files as they are found.
    An empty shard among others (of a folder, a pattern or a range) is passed over with a note.
    Raises SourceError, naming the path, if one is missing, is no source, or holds no image, or no image is selected.
    """
    listed_at_ns = time.time_ns()
    groups = [[one for place in expand_source(typed, tell) for one in sources_at(place, tell)] for typed in sources]
    places = [source for group in groups for source in group]
    if member:
        places = with_member(places, member)
    refuse_doubles(places)
    containers: list[Container] = []
    found: list[SourceImages] = []
    keys: list[str] = []
    notes: list[str] = []
    stamps: Stamps = {}
    empty: dict[str, str] = {}
    for source, prefix, (one, seen) in zip(places, prefixes(places), _all_listed(places, tell), strict=True):
        if not one.members:
            more = f": {one.notes[0]}" if one.notes else ""
            names = (
                f". Images are files whose names end in {' '.join(sorted(EXTENSIONS))}"
                if source.kind == "folder"
                else ""
            )
            empty[source.path] = f"{source.path} holds no image{more}{names}"
        stamps |= seen
        containers.append(Container(kind=one.kind or source.kind, path=source.path, prefix=prefix, column=one.column))
        notes += [f"{source.path}: {note}" for note in one.notes if one.members]
        keys += [prefix + member for member in one.members] if prefix else one.members
        found.append(one)
    notes += _empty_shards(groups, empty)
    if len(notes) > _MAX_NOTES:
        notes[_MAX_NOTES - 1 :] = [f"... and {len(notes) - _MAX_NOTES + 1} more such notes"]
    rows, passing = selection.rows(keys)
    notes += _told(selection, len(rows), passing, keys)
    labels, names = joined_labels(found)
    labels = labels[rows]
    if (labels >= 0).any() and (missing := np.flatnonzero(labels < 0)).size:
        notes.append(f"{missing.size} of {len(rows)} images have no class (such as {keys[rows[missing[0]]]})")
    if names is None:
        labels, names = sparse_numbers_named(labels)
        if names is not None:
            notes.append(
                f"class numbers go up to {names[-1]}, of {len(names)} classes: the numbers are kept as names of classes"
            )
    else:
        labels, names = without_empty_classes(labels, names)
    numbers = np.repeat(np.arange(len(found), dtype=np.int32), [len(one.members) for one in found])
    index = ImageIndex(
        keys=keys
        if len(rows) == len(keys) and selection.shuffle_seed is None
        else [keys[row] for row in rows.tolist()],
        labels=labels,
        container=numbers[rows],
        offset=np.concatenate([one.offset for one in found])[rows],
        length=np.concatenate([one.length for one in found])[rows],
    )
    return Listing(index, tuple(containers), names or (), tuple(notes), stamps, listed_at_ns)


def _empty_shards(groups: Sequence[Sequence[Source]], empty: Mapping[str, str]) -> list[str]:
    """A note on the shards without an image. Raises SourceError if all that one `--images` names have none.

    Args:
        groups: what each `--images` names.
        empty: path -> a sentence about it.
    """
    for group in groups:
        if group and all(source.path in empty for source in group):
            raise SourceError(empty[group[0].path])
    if not empty:
        return []
    more = f", and so do {len(empty) - 1} more" if len(empty) > 1 else ""
    return [f"{next(iter(empty.values()))}{more}"]


def _all_listed(places: Sequence[Source], tell: OnListed) -> Iterator[tuple[SourceImages, Stamps]]:
    """Each source listed, in order; several at once where there are buckets to wait for."""
    if not any(is_url(source.path) for source in places):
        yield from (_listed(source, tell) for source in places)
        return
    with ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="list") as pool:
        yield from ahead(pool, lambda source: _listed(source, tell), places, depth=2 * REQUESTS_AT_ONCE)


def _listed(source: Source, tell: OnListed) -> tuple[SourceImages, Stamps]:
    """One source, and when what it consists of was changed last; asked before it is read."""
    path = source.path
    try:
        if source.kind == "folder":
            if is_url(path):
                return images_of_tree(listed_tree(source.files)), {path: never_trusted()}
            tree = walk_folder(Path(path), tell)
            return images_of_tree(tree), {
                f"{path}/{below}" if below else path: (at, 0) for below, at in tree.folders.items()
            }
        stamps = stamps_of([path])
    except FileNotFoundError as exc:
        raise SourceError(f"{path} does not exist") from exc
    except ImageError as exc:  # an address that nothing can have
        raise SourceError(f"{path} {exc}") from exc
    except OSError as exc:
        raise SourceError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    match source.kind:
        case "tar":
            return list_tar(path, tell, member=source.image_column, class_field=source.label_column), stamps
        case "parquet":
            found = list_parquet(path, image=source.image_column, label=source.label_column)
        case "list":
            found = list_file_list(path, read_source(path), image=source.image_column, label=source.label_column)
    tell(len(found.members))
    return found, stamps


def _told(selection: Selection, used: int, passing: int, keys: Sequence[str]) -> list[str]:
    if passing == 0:
        raise SourceError(
            f"no image passes {' '.join(f'--filter {pattern!r}' for pattern in selection.filters)}: a pattern is held against "
            f"the whole key, such as '{keys[0]}'"
        )
    notes: list[str] = []
    if selection.filters and passing < len(keys):
        notes.append(f"{passing} of {len(keys)} images pass the filters (--filter)")
    if used < passing:
        shuffled = "" if selection.shuffle_seed is None else ", shuffled,"
        notes.append(f"the first {used} of {passing} images{shuffled} are used (--limit)")
    return notes


def same_images(stored: ImageIndex, listed: ImageIndex) -> str | None:
    """None if a cache's list of images is what the sources hold now; else the difference in words."""
    if stored.keys == listed.keys:
        if all((getattr(stored, column) == getattr(listed, column)).all() for column in ("labels", "offset", "length")):
            return None
        return "the same images with other labels or at other places in their tars"
    old, new = set(stored.keys), set(listed.keys)
    added, gone = sorted(new - old), sorted(old - new)
    if not added and not gone:
        return "the same images in another order"
    parts: list[str] = []
    if added:
        parts.append(f"{len(added)} new image{'s' if len(added) > 1 else ''} (such as {added[0]})")
    if gone:
        parts.append(f"{len(gone)} missing (such as {gone[0]})")
    return " and ".join(parts)


def begins_with(listing: Listing, stored: ImageIndex, meta: CacheMeta) -> bool:
    """Return whether a listing is a cache's list of images and then more: nothing moved, renamed or in another class."""
    known, index = len(stored), listing.index
    if len(index) <= known or listing.containers[: len(meta.containers)] != meta.containers:
        return False
    columns = ("container", "offset", "length")
    return (
        index.keys[:known] == [*stored.keys]
        and all(np.array_equal(getattr(index, name)[:known], getattr(stored, name)) for name in columns)
        and _classes(index.labels[:known], listing.class_names) == _classes(stored.labels, meta.class_names)
    )


def with_recorded_prefixes(listing: Listing, meta: CacheMeta) -> Listing:
    """Return a listing whose first places have their images under the keys that a cache has for them.

    A key begins with the path of its place below the folder that all places share: it changes where a place is renamed, and
    where another place is added. Images are the same all the same. Returned as it is where the places are of other kinds, or
    where a key would come twice.
    """
    then, now = meta.containers, listing.containers
    prefixes = [old.prefix for old in then] + [new.prefix for new in now[len(then) :]]
    if len(now) < len(then) or prefixes == [new.prefix for new in now]:
        return listing
    if [(old.kind, old.column) for old in then] != [(new.kind, new.column) for new in now[: len(then)]]:
        return listing
    index = listing.index
    keys = [
        prefixes[number] + key.removeprefix(now[number].prefix)
        for key, number in zip(index.keys, index.container.tolist(), strict=True)
    ]
    if len(set(keys)) < len(keys):
        return listing
    containers = tuple(replace(new, prefix=prefix) for new, prefix in zip(now, prefixes, strict=True))
    index = ImageIndex(
        keys=keys, labels=index.labels, container=index.container, offset=index.offset, length=index.length
    )
    return replace(listing, index=index, containers=containers)


def _classes(labels: NDArray[np.int32], names: tuple[str, ...]) -> list[str | int]:
    """Names, because numbers shift when a class is added."""
    return [names[label] if 0 <= label < len(names) else label for label in labels.tolist()]


__all__ = ["Listing", "begins_with", "list_images", "same_images", "with_recorded_prefixes"]
