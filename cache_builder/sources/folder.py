"""A folder tree of image files; the first folder below the root is the class."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from radio_cache.images import EXTENSIONS


@dataclass(frozen=True)
class FolderImage:
    """One file: its path below the root with forward slashes, and the folder that names its class, if any."""

    member: str
    class_name: str | None


def list_folder(root: Path) -> tuple[list[FolderImage], int]:
    """All image files below `root` in sorted order, and how many other files were passed over.

    Hidden files and folders are passed over without counting. Linked folders are followed, each only once.
    """
    images: list[FolderImage] = []
    others = 0
    for path in _files(root):
        if PurePosixPath(path).suffix.lower() in EXTENSIONS:
            parts = path.split("/")
            images.append(FolderImage(path, parts[0] if len(parts) > 1 else None))
        else:
            others += 1
    return sorted(images, key=lambda image: image.member), others


def _files(root: Path) -> Iterator[str]:
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back to a folder above would never end
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = Path(folder).relative_to(root)
        yield from ((relative / name).as_posix() for name in files if not name.startswith("."))
