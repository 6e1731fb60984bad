"""The bytes of files, whole or by range, wherever they lie: on a local disk, or at a URL.

The places come from a cache, which may come from anybody: nothing but regular files of a sensible size is read.
"""

import contextlib
import os
import stat
from collections.abc import Generator
from pathlib import Path

from radio_cache.errors import ImageError, LimitError
from radio_cache.remote_files import fetch, fetch_range
from radio_cache.storage import is_url

MAX_IMAGE_FILE_BYTES = 1 << 30
"""Larger image files are refused: nobody's, or no images."""


def read_place(place: str, offset: int = -1, length: int = -1) -> bytes:
    """A whole file (offset -1), or a range of its bytes. place: a path or a URL.

    Raises ImageError as `read_local` does; StorageError if a bucket or a server cannot be reached or refuses: that says
    nothing about the image, and no build may go on without it.
    """
    if not is_url(place):
        return read_local(Path(place), offset, length)
    try:
        if offset < 0:
            return fetch(place, most=MAX_IMAGE_FILE_BYTES)
        refuse_large(length)
        data = fetch_range(place, offset, length) if length >= 0 else b""
    except FileNotFoundError as exc:
        raise ImageError(f"cannot be read: there is nothing at {place:.200}") from exc
    except PermissionError as exc:
        raise ImageError(f"cannot be read: the server refuses {place:.200}") from exc
    except LimitError as exc:
        raise ImageError(f"cannot be read: {exc}") from exc
    if len(data) != length:
        raise ImageError(f"cannot be read: {place:.200} ends inside it")
    return data


def read_local(path: Path, offset: int = -1, length: int = -1) -> bytes:
    """A whole regular file (offset -1), or a range of its bytes. Never waits for the other end of a named pipe.

    Raises ImageError: the operating system's reason, a file that is not regular, too large, or ends inside the range.
    """
    with open_local(path) as (descriptor, size):
        if offset < 0:
            offset, length = 0, size
        elif not 0 <= length <= size - offset:
            raise ImageError(f"cannot be read: {path} ends inside it")
        refuse_large(length)
        data = os.pread(descriptor, length, offset)
    if len(data) != length:
        raise ImageError(f"cannot be read: {path} ends inside it")
    return data


@contextlib.contextmanager
def open_local(path: Path) -> Generator[tuple[int, int]]:
    """The descriptor and the size of a regular file. What goes wrong, also in the body, is an ImageError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"cannot be read: {path} is {kind_of_file(status.st_mode)}, not a file")
            yield descriptor, status.st_size
        finally:
            os.close(descriptor)
    except OSError as exc:
        raise ImageError(f"cannot be read: {exc.strerror or exc}") from exc
    except ValueError as exc:  # a path with a NUL
        raise ImageError(f"cannot be read: {exc}") from exc


def refuse_large(num_bytes: int) -> None:
    """Raise ImageError for a file that is too large to be an image, before it is read."""
    if num_bytes > MAX_IMAGE_FILE_BYTES:
        raise ImageError(f"cannot be read: {num_bytes} bytes are more than an image file has ({MAX_IMAGE_FILE_BYTES})")


def kind_of_file(mode: int) -> str:
    """What a file is that is not regular, in words, from its mode."""
    kinds = {
        stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    }  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "something special")
