"""Bytes of files, whole or by range, on a local disk or at a URL.

Paths may come from an untrusted cache, so only regular files of a plausible size are read.
"""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Generator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from radio_cache.errors import ImageError, LimitError, StorageError, UnreadableImageError
from radio_cache.images.remote import fetch, fetch_range, is_known_url
from radio_cache.images.web import WEB
from radio_cache.storage.base import is_url

MAX_IMAGE_FILE_BYTES = 1 << 30
"""Larger image files are refused: no real image is this large."""


def read_path_or_url(place: str, offset: int = -1, length: int = -1) -> bytes:
    """Return a whole file (offset -1), or a range of its bytes. place: a path or a URL.

    Raises:
        UnreadableImageError: there is nothing at this place now, access is refused, or the file ends inside the range.
        ImageError: no image can lie there: the place is no regular file, too large, or no possible path.
        StorageError: no file can be read now: a bucket or a server cannot be reached, or there is no memory or descriptor left.
    """
    if not is_url(place):
        return read_local(Path(place), offset, length)
    try:
        if offset < 0:
            return fetch(place, max_bytes=MAX_IMAGE_FILE_BYTES)
        refuse_large(length)
        # A negative length can only come from a damaged index; the check below then reports a file that is cut short.
        data = fetch_range(place, offset, length) if length >= 0 else b""
    except FileNotFoundError as exc:
        raise UnreadableImageError(f"cannot be read: there is nothing at {place:.200}") from exc
    except PermissionError as exc:
        raise UnreadableImageError(f"cannot be read: the server refuses {place:.200}") from exc
    except LimitError as exc:
        raise ImageError(f"cannot be read: {exc}") from exc
    if len(data) != length:  # the container became shorter since its members were listed
        raise UnreadableImageError(f"cannot be read: {place:.200} ends inside it")
    return data


def read_local(path: Path, offset: int = -1, length: int = -1) -> bytes:
    """Return a whole regular file (offset -1), or a range of its bytes. Never waits for the other end of a named pipe.

    Raises as `read_path_or_url` does.
    """
    with open_local(path) as (descriptor, size):
        whole = offset < 0
        if whole:
            offset, length = 0, size
        # Compared with the real size before memory is allocated for `length`, which an untrusted index states.
        elif not 0 <= length <= size - offset:
            raise UnreadableImageError(f"cannot be read: {path} ends inside it")
        refuse_large(length)
        data = os.pread(descriptor, length, offset)
    if len(data) != length:
        raise UnreadableImageError(f"cannot be read: {path} became shorter while it was read")
    return data


@contextlib.contextmanager
def open_local(path: Path) -> Generator[tuple[int, int]]:
    """Open a regular file and yield its descriptor and size. Errors, also those in the body, are those of `read_path_or_url`."""
    try:
        # Without O_NONBLOCK the open of a named pipe waits for a writer; without O_NOCTTY a terminal could become
        # the controlling one.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            # Of the descriptor: the path may lead to another file by now.
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"cannot be read: {path} is {kind_of_file(status.st_mode)}, not a file")
            yield descriptor, status.st_size
        finally:
            os.close(descriptor)
    except OSError as exc:
        raise reading_error(path, exc) from exc
    except MemoryError as exc:
        raise StorageError(f"cannot read {path}: {_CURES[errno.ENOMEM]}") from exc
    except ValueError as exc:  # a path with a NUL
        raise ImageError(f"cannot be read: {exc}") from exc


_CURES = {
    errno.EMFILE: "too many files are open: raise `ulimit -n`, and run the same command again",
    errno.ENFILE: "too many files are open on this machine: close some, and run the same command again",
    errno.ENOMEM: "not enough memory: free some, or take fewer --threads, and run the same command again",
    errno.ENOBUFS: "not enough memory: free some, or take fewer --threads, and run the same command again",
}
"""Errors of the process or the machine rather than of one file, with their cures."""

_IMPOSSIBLE = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)
"""No file can have such a path."""


def reading_error(path: Path | str, error: OSError) -> ImageError | StorageError:
    """Return the error to raise for a system error of a file."""
    number = error.errno or 0
    # Every other image would fail in the same way, so the image is not at fault.
    if number in _CURES:
        return StorageError(f"cannot read {path}: {_CURES[number]}")
    reason = f"cannot be read: {error.strerror or error}"
    return ImageError(reason) if number in _IMPOSSIBLE else UnreadableImageError(reason)


def refuse_large(num_bytes: int) -> None:
    """Raise ImageError for a file that is too large to be an image, before it is read."""
    if num_bytes > MAX_IMAGE_FILE_BYTES:
        raise ImageError(f"cannot be read: {num_bytes} bytes are more than an image file has ({MAX_IMAGE_FILE_BYTES})")


def kind_of_file(mode: int) -> str:
    """Return the kind of a file that is not regular, in words, from its mode."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something special")


# file:/path, file:///path and file://localhost/path. Another host would be no local file.
_FILE_URL = re.compile(r"file:(?://(?:localhost)?(?=/)|(?=/(?!/)))", re.IGNORECASE)


def resolve_list_entry(list_file: str, entry: str) -> str:
    """Return where a line of a list of files leads: a URL or an absolute path as it is, others from the list's own folder.

    At a URL, too, "." and ".." lead through folders. Raises ImageError for a URL of a kind that nothing here reads, and for a
    path that leads out of a bucket or a server.
    """
    local = _FILE_URL.match(entry)
    if local is not None:
        path = entry[local.end() :]
        # Lists hold such URLs with and without percent-encoding: a path that exists as written wins.
        return path if Path(path).exists() else unquote(path, errors="surrogateescape")
    if is_url(entry):
        if not is_known_url(entry):
            raise ImageError(f"cannot be read: nothing here reads URLs such as {entry!r:.200}")
        return entry
    if PurePosixPath(entry).is_absolute():
        return entry
    if is_url(list_file):
        return _below_url(list_file, entry)
    return f"{list_file.rpartition('/')[0]}/{entry}"


def _below_url(list_file: str, entry: str) -> str:
    scheme, _, rest = list_file.partition("://")
    if scheme.lower() in WEB:
        # A query belongs to the address of the list, not to its folder, and may contain slashes.
        rest = rest.partition("#")[0].partition("?")[0]
    host, *folders = rest.split("/")[:-1] or [rest]
    # Resolved here: servers and buckets treat ".." differently, and it must not lead out of the host.
    for part in entry.split("/"):
        if part == ".." and not folders:
            raise ImageError(f"cannot be read: {entry!r:.200} leads out of {scheme}://{host}")
        if part == "..":
            folders.pop()
        elif part != ".":
            folders.append(part)
    return f"{scheme}://{'/'.join([host, *folders])}"
