"""A folder tree of image files; the first folder below the root is the class."""

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cache_builder.sources.columns import SkippedFiles, SourceImages, nowhere, numbered
from radio_cache.errors import SourceError
from radio_cache.images.decode import EXTENSIONS
from radio_cache.images.files import kind_of_file
from radio_cache.images.remote import OnListed

_LONGEST_NAME = 256
_USUAL_PATH_MAX = 4096


@dataclass(frozen=True)
class Tree:
    """What lies below a folder. images: sorted paths with forward slashes; others: files that are no images by name.

    special: images by name that are pipes, sockets or devices, as "path (what it is)". too_deep: folders and images whose whole
    path is longer than the system opens.
    folders: every folder looked into ("" is the root) with the time of its last change, in nanoseconds.
    """

    images: list[str] = field(default_factory=list[str])
    others: SkippedFiles = field(default_factory=SkippedFiles)
    special: list[str] = field(default_factory=list[str])
    too_deep: list[str] = field(default_factory=list[str])
    folders: dict[str, int] = field(default_factory=dict[str, int])


def walk_folder(root: Path, tell: OnListed = lambda _: None) -> Tree:
    """List a folder tree. Hidden files and folders are passed over; linked folders are followed, each only once.

    tell: told after each folder how many images were found in it.
    Raises SourceError for a folder that must not be read: its images would be lost without a word.
    """
    images: list[str] = []
    special: list[str] = []
    too_deep: list[str] = []
    most_bytes = _path_max(root)
    folders: dict[str, int] = {}
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    others = SkippedFiles()
    while waiting:
        below = waiting.pop()
        place = f"{root}/{below}" if below else str(root)
        try:
            status = os.stat(place)  # noqa: PTH116  # a million files: no Path for each
            if (status.st_dev, status.st_ino) in seen:  # a link back to a folder above would never end
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[below] = status.st_mtime_ns
            room = most_bytes - len(os.fsencode(place)) - 2  # of a name, behind a slash and before a zero byte
            before = len(images)
            inner: list[str] = []
            with os.scandir(place) as entries:
                for entry in entries:
                    name = entry.name
                    if name.startswith("."):
                        continue
                    path = f"{below}/{name}" if below else name
                    kind = _kind(entry)
                    if (
                        room < _LONGEST_NAME
                        and len(os.fsencode(name)) > room
                        and (kind == "a folder" or has_image_name(name))
                    ):
                        too_deep.append(path)
                    elif kind == "a folder":
                        inner.append(path)
                    elif not has_image_name(name):
                        others.add(path)
                    elif kind:
                        special.append(f"{path} ({kind})")
                    else:
                        images.append(path)
            waiting += sorted(inner, reverse=True)
            tell(len(images) - before)
        except OSError as exc:
            may_not = exc.errno in (errno.EACCES, errno.EPERM)
            cure = "have its permissions changed" if may_not else "look at the disk, and run the same command again"
            raise SourceError(f"{place} cannot be listed: {exc.strerror or exc}: {cure}") from exc
    images.sort()
    return Tree(images, others, sorted(special), sorted(too_deep), folders)


def listed_tree(names: Iterable[str]) -> Tree:
    """The tree that these files make, as a bucket lists them: paths below it."""
    images: list[str] = []
    others = SkippedFiles()
    for name in names:
        # "." and ".." in a key hide nothing: whoever reads such an object says what is the matter with it.
        if not name or any(part.startswith(".") and part not in (".", "..") for part in name.split("/")):
            continue
        if has_image_name(name):
            images.append(name)
        else:
            others.add(name)
    return Tree(sorted(images), others)


def images_of_tree(tree: Tree) -> SourceImages:
    """All images of a tree, in sorted order."""
    labels, names = numbered(list(_classes(tree.images)))
    notes: list[str] = []
    if tree.others.count:
        notes.append(tree.others.note)
    if tree.special:
        many = f"s such as {tree.special[0]}" if len(tree.special) > 1 else f", {tree.special[0]},"
        notes.append(
            f"{len(tree.special)} image name{many} passed over: not {'files' if len(tree.special) > 1 else 'a file'}"
        )
    if tree.too_deep:
        notes.append(
            f"{len(tree.too_deep)} too deep to be opened, passed over with all below: the system opens paths of {_path_max()} "
            f"bytes ({tree.too_deep[0][:40]}...)"
        )
    count = len(tree.images)
    return SourceImages(
        members=tree.images,
        labels=labels,
        class_names=names or None,
        offset=nowhere(count),
        length=nowhere(count),
        notes=tuple(notes),
    )


def has_image_name(name: str) -> bool:
    """Return whether a file counts as an image by the ending of its name."""
    return name[name.rfind(".") :].lower() in EXTENSIONS


def _path_max(root: Path = Path("/")) -> int:
    """The bytes of the longest path that the system opens, with the zero byte at its end."""
    try:
        return os.pathconf(root, "PC_PATH_MAX")
    except (OSError, ValueError, AttributeError):  # no such folder, no limit, no POSIX
        return _USUAL_PATH_MAX


def _classes(members: list[str]) -> Iterator[str | None]:
    for member in members:
        first, slash, _ = member.partition("/")
        yield first or None if slash else None


def _kind(entry: "os.DirEntry[str]") -> str:
    """What an entry is, links followed; nothing for a file, and for a link to nowhere, which the build shall name."""
    try:
        if entry.is_file():  # these two ask the system nothing, for all but links
            return ""
        mode = stat.S_IFDIR if entry.is_dir() else entry.stat().st_mode
    except OSError:
        return ""
    return kind_of_file(mode)
