"""The files that a cache's images came from: where each lies, and its bytes, whichever kind of container holds it.

The places come from a cache, which may come from anybody: nothing but regular files of a sensible size is read.
"""

import os
import stat
from pathlib import Path, PurePosixPath

from radio_cache.errors import ImageError, UnsupportedFormatError
from radio_cache.schema import Container
from radio_cache.storage import is_url

MAX_IMAGE_FILE_BYTES = 1 << 30
"""Larger image files are refused: nobody's, or no images."""


def read_image(container: Container, key: str, offset: int, length: int) -> bytes:
    """The bytes of one image, from its row of the image index.

    Raises ImageError with the reason if they cannot be had, UnsupportedFormatError for a kind of container that only
    a newer radio-cache knows.
    """
    member = key.removeprefix(container.prefix)
    match container.kind:
        case "folder":
            return read_local(Path(container.path) / _inside(member))
        case "list":
            place = listed_place(container.path, member)
            if is_url(place):
                raise ImageError(f"cannot be read: {place:.200} is a URL, and this radio-cache reads images from disks")
            return read_local(Path(place))
        case "tar":
            return read_local(Path(container.path), offset, length)
        case _:
            raise UnsupportedFormatError(
                f"image {key} lies in a container of kind '{container.kind}' ({container.path}), which this radio-cache "
                "does not know: install a newer one"
            )


def listed_place(list_file: str, entry: str) -> str:
    """Where a line of a list of files leads: a URL or an absolute path as it is, others from the list's own folder."""
    if is_url(entry) or PurePosixPath(entry).is_absolute():
        return entry
    return f"{list_file.rpartition('/')[0]}/{entry}"


def read_local(path: Path, offset: int = -1, length: int = -1) -> bytes:
    """A whole regular file (offset -1), or a range of its bytes. Never waits for the other end of a named pipe.

    Raises ImageError: the operating system's reason, a file that is not regular, too large, or ends inside the range.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"cannot be read: {path} is {kind_of_file(status.st_mode)}, not a file")
            if offset < 0:
                offset, length = 0, status.st_size
            elif not 0 <= length <= status.st_size - offset:
                raise ImageError(f"cannot be read: {path} ends inside it")
            refuse_large(length)
            data = os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)
    except OSError as exc:
        raise ImageError(f"cannot be read: {exc.strerror or exc}") from exc
    except ValueError as exc:  # a path with a NUL
        raise ImageError(f"cannot be read: {exc}") from exc
    if len(data) != length:
        raise ImageError(f"cannot be read: {path} ends inside it")
    return data


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


def _inside(member: str) -> str:
    """A path below a folder, itself."""
    if member.startswith("/") or ".." in member.split("/"):
        raise ImageError(f"cannot be read: {member!r:.80} is no path below a folder")
    return member
