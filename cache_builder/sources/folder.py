"""Folder trees of image files. The first folder below the root is the class."""

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
    """The files below a folder, by paths with forward slashes that start from it."""

    images: list[str] = field(default_factory=list[str])
    """Sorted paths of the images."""

    others: SkippedFiles = field(default_factory=SkippedFiles)
    """Files without the name of an image."""

    special: list[str] = field(default_factory=list[str])
    """Pipes, sockets and devices with the name of an image, as "path (kind)"."""

    too_deep: list[str] = field(default_factory=list[str])
    """Folders and images whose whole path is longer than the system opens."""

    folders: dict[str, int] = field(default_factory=dict[str, int])
    """Every listed folder ("" is the root) -> time of its last change in nanoseconds."""


def walk_folder(root: Path, on_listed: OnListed = lambda _: None) -> Tree:
    """List a folder tree without its hidden files and folders. Symbolic links are followed, each folder once.

    Args:
        root: the folder.
        on_listed: called after each folder with the number of images in it.

    Raises:
        SourceError: a folder cannot be listed. Skipping it would silently lose its images.
    """
    images: list[str] = []
    special: list[str] = []
    too_deep: list[str] = []
    max_path_bytes = _path_max(root)
    folders: dict[str, int] = {}
    visited: set[tuple[int, int]] = set()  # (device, inode)
    pending = [""]
    others = SkippedFiles()
    while pending:
        below = pending.pop()
        folder = f"{root}/{below}" if below else str(root)
        try:
            status = os.stat(folder)  # noqa: PTH116  # a million files: no Path for each
            if (status.st_dev, status.st_ino) in visited:  # a link to a folder above would never end
                continue
            visited.add((status.st_dev, status.st_ino))
            folders[below] = status.st_mtime_ns
            # Bytes left for a name, after the slash before it and the zero byte behind it.
            max_name_bytes = max_path_bytes - len(os.fsencode(folder)) - 2
            num_before = len(images)
            subfolders: list[str] = []
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name
                    if name.startswith("."):
                        continue
                    path = f"{below}/{name}" if below else name
                    kind = _kind(entry)
                    # The cheap comparison first: hardly any folder is so deep that names must be measured.
                    if (
                        max_name_bytes < _LONGEST_NAME
                        and len(os.fsencode(name)) > max_name_bytes
                        and (kind == "a folder" or has_image_name(name))
                    ):
                        too_deep.append(path)
                    elif kind == "a folder":
                        subfolders.append(path)
                    elif not has_image_name(name):
                        others.add(path)
                    elif kind:
                        special.append(f"{path} ({kind})")
                    else:
                        images.append(path)
            # `pending` is a stack: reversed, so that folders are visited in sorted order.
            pending += sorted(subfolders, reverse=True)
            on_listed(len(images) - num_before)
        except OSError as exc:
            is_refused = exc.errno in (errno.EACCES, errno.EPERM)
            cure = "change its permissions" if is_refused else "check the disk, and run the same command again"
            raise SourceError(f"{folder} cannot be listed: {exc.strerror or exc}: {cure}") from exc
    # Sorted as whole paths: the order of rows does not depend on the order of the file system.
    images.sort()
    return Tree(images, others, sorted(special), sorted(too_deep), folders)


def listed_tree(names: Iterable[str]) -> Tree:
    """Return the tree of these files, as a bucket lists them: by paths below a prefix."""
    images: list[str] = []
    others = SkippedFiles()
    for name in names:
        # "." and ".." as parts of a key hide nothing. An object with such a key is refused when it is read.
        if not name or any(part.startswith(".") and part not in (".", "..") for part in name.split("/")):
            continue
        if has_image_name(name):
            images.append(name)
        else:
            others.add(name)
    return Tree(sorted(images), others)


def images_of_tree(tree: Tree) -> SourceImages:
    """Return all images of a tree in sorted order, with their classes and notes on what is skipped."""
    labels, names = numbered(list(_classes(tree.images)))
    notes: list[str] = []
    if tree.others.count:
        notes.append(tree.others.note)
    if tree.special:
        example = f"s such as {tree.special[0]}" if len(tree.special) > 1 else f", {tree.special[0]},"
        notes.append(
            f"{len(tree.special)} image name{example} skipped: not {'files' if len(tree.special) > 1 else 'a file'}"
        )
    if tree.too_deep:
        notes.append(
            f"{len(tree.too_deep)} too deep to be opened, skipped with all below: the system opens paths of {_path_max()} "
            f"bytes ({tree.too_deep[0][:40]}...)"
        )
    num_images = len(tree.images)
    return SourceImages(
        members=tree.images,
        labels=labels,
        class_names=names or None,
        offset=nowhere(num_images),
        length=nowhere(num_images),
        notes=tuple(notes),
    )


def has_image_name(name: str) -> bool:
    """Return whether the extension of a file's name is that of an image."""
    return name[name.rfind(".") :].lower() in EXTENSIONS


def _path_max(root: Path = Path("/")) -> int:
    """Return the length in bytes of the longest path that the system opens, with the zero byte at its end."""
    try:
        return os.pathconf(root, "PC_PATH_MAX")
    except (OSError, ValueError, AttributeError):  # no such folder, no limit, no POSIX
        return _USUAL_PATH_MAX


def _classes(members: list[str]) -> Iterator[str | None]:
    """Yield the first folder of each path, None for a file in the root itself."""
    for member in members:
        first_folder, slash, _ = member.partition("/")
        yield first_folder or None if slash else None


def _kind(entry: "os.DirEntry[str]") -> str:
    """Return the kind of an entry, symbolic links followed: "" for a file, "a folder", or another kind.

    A broken link counts as a file, so that the build reports it by name.
    """
    try:
        if entry.is_file():  # is_file and is_dir need a system call for links only
            return ""
        mode = stat.S_IFDIR if entry.is_dir() else entry.stat().st_mode
    except OSError:
        return ""
    return kind_of_file(mode)
