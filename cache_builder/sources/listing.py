"""From `--images` to the list of images that a cache keeps: keys, labels and places."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache_builder.sources.folder import FolderImage, list_folder
from cache_builder.sources.webdataset import TarImage, list_tar
from radio_cache.errors import SourceError
from radio_cache.images import EXTENSIONS
from radio_cache.schema import CacheMeta, Container
from radio_cache.writer import ImageIndex

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Listing:
    """What a cache will be made of. notes: sentences a user should see (files passed over, names that came twice)."""

    index: ImageIndex
    containers: tuple[Container, ...]
    class_names: tuple[str, ...]
    notes: tuple[str, ...]


def list_images(sources: Sequence[str], *, limit: int | None = None) -> Listing:
    """List the images of folders and tars, in the order given, sorted within a folder.

    sources: folders of images, folders of tars, tars, glob patterns and WebDataset brace ranges
        (`train-{000..004}.tar`). limit: keep the first so many images.
    Raises SourceError, naming the path, if one is missing, is no folder or tar, or holds no image.
    """
    paths = [path for source in sources for path in _expand(source)]
    known = set(paths)
    if len(known) < len(paths):
        raise SourceError(f"{next(p for p in paths if paths.count(p) > 1)} is given twice as a source of images")
    for path in paths:
        outer = known.intersection(path.parents) if path.is_dir() else None
        if outer:
            raise SourceError(f"{path} is part of {outer.pop()}, another source: its images would count twice")
    containers: list[Container] = []
    found: list[tuple[int, str, str | int | None, int, int]] = []
    notes: list[str] = []
    for number, (path, prefix) in enumerate(zip(paths, _prefixes(paths), strict=True)):
        kind = "folder" if path.is_dir() else "tar"
        containers.append(Container(kind=kind, path=str(path), prefix=prefix))
        if kind == "folder":
            images, others = list_folder(path)
            repeated = 0
        else:
            images, others, repeated = list_tar(path)
        if not images:
            raise SourceError(
                f"{path} holds no image" + (f" ({others} other file{'s' * (others > 1)})" if others else "")
            )
        if others:
            notes.append(f"{path}: {others} file{'s' if others > 1 else ''} passed over (no image by name)")
        if repeated:
            notes.append(
                f"{path}: {repeated} image name{'s' if repeated > 1 else ''} came twice; the later ones are called name#2"
            )
        found += [(number, prefix + image.member, *_place(image)) for image in images]
    if limit is not None and limit < len(found):
        notes.append(f"the first {limit} of {len(found)} images are used (--limit)")
        found = found[:limit]
    labels, class_names = _labels([label for _, _, label, _, _ in found])
    index = ImageIndex(
        keys=[key for _, key, _, _, _ in found],
        labels=labels,
        container=np.array([container for container, *_ in found], dtype=np.int32),
        offset=np.array([offset for *_, offset, _ in found], dtype=np.int64),
        length=np.array([length for *_, length in found], dtype=np.int64),
    )
    return Listing(index, tuple(containers), class_names, tuple(notes))


def _place(image: FolderImage | TarImage) -> tuple[str | int | None, int, int]:
    if isinstance(image, FolderImage):
        return image.class_name, -1, -1
    return image.label, image.offset, image.length


def _labels(raw: list[str | int | None]) -> tuple[np.ndarray[tuple[int], np.dtype[np.int32]], tuple[str, ...]]:
    names = sorted({label for label in raw if isinstance(label, str)})
    if names and any(isinstance(label, int) for label in raw):
        raise SourceError(
            "some images have class folders and others have class numbers (.cls): build two caches instead"
        )
    number = {name: position for position, name in enumerate(names)}
    labels = [number[label] if isinstance(label, str) else (-1 if label is None else label) for label in raw]
    return np.array(labels, dtype=np.int32), tuple(names)


def _expand(source: str) -> list[Path]:
    braces = _BRACES.search(source)
    if braces:
        low, high = braces.groups()
        if int(low) > int(high):
            raise SourceError(f"{source}: the range {braces[0]} counts down")
        names = [source.replace(braces[0], f"{i:0{len(low)}d}", 1) for i in range(int(low), int(high) + 1)]
        return [path for name in names for path in _expand(name)]
    path = Path(source).expanduser()
    if any(mark in source for mark in "*?[") and not path.exists():
        matches = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor) if path.anchor else path)))
        if not matches:
            raise SourceError(f"no file matches '{source}'")
        return [found for match in matches for found in _expand(str(match))]
    if not path.exists():
        raise SourceError(f"{source} does not exist: --images takes a folder of images, or WebDataset tars")
    path = path.resolve()
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        entries = [entry for entry in path.iterdir() if entry.suffix != ".tar" and not entry.name.startswith(".")]
        others = any(entry.is_dir() for entry in entries)
        if tars and any(entry.suffix.lower() in EXTENSIONS for entry in entries):
            raise SourceError(f"{source} holds both tars and images: name the tars as '{source.rstrip('/')}/*.tar'")
        return tars if tars and not others else [path]
    if path.name.lower().endswith(_COMPRESSED):
        raise SourceError(f"{source} is a compressed tar, which has no random access: decompress it first")
    if path.suffix.lower() != ".tar":
        raise SourceError(f"{source} is a file, and not a tar: --images takes a folder of images, or WebDataset tars")
    return [path]


def _prefixes(paths: list[Path]) -> list[str]:
    """What keeps keys of several sources apart: each one's path below the folder they share."""
    if len(paths) == 1 and paths[0].is_dir():
        return [""]
    shared = Path(os.path.commonpath([path.parent for path in paths]))
    return [f"{path.relative_to(shared).as_posix()}/" for path in paths]


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
    """Whether a listing is a cache's list of images and then more: nothing moved, renamed or in another class."""
    known, index = len(stored), listing.index
    if len(index) <= known or listing.containers[: len(meta.containers)] != meta.containers:
        return False
    columns = ("container", "offset", "length")
    return (
        index.keys[:known] == [*stored.keys]
        and all(np.array_equal(getattr(index, name)[:known], getattr(stored, name)) for name in columns)
        and _classes(index.labels[:known], listing.class_names) == _classes(stored.labels, meta.class_names)
    )


def _classes(labels: NDArray[np.int32], names: tuple[str, ...]) -> list[str | int]:
    """Names, because numbers shift when a class is added."""
    return [names[label] if 0 <= label < len(names) else label for label in labels.tolist()]


__all__ = ["Listing", "begins_with", "list_images", "same_images"]
