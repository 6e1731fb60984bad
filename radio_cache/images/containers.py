"""The files that a cache's images came from: where each lies, and its bytes, whichever kind of container holds it."""

import re
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from radio_cache.errors import ImageError, UnsupportedFormatError
from radio_cache.format.schema import Container
from radio_cache.images.files import read_place
from radio_cache.images.remote import is_known_url
from radio_cache.images.sparse_members import expanded
from radio_cache.images.web import WEB
from radio_cache.storage.base import is_url

_FILE_URL = re.compile(r"file:(?://(?:localhost)?(?=/)|(?=/(?!/)))", re.IGNORECASE)


def read_image(container: Container, key: str, offset: int, length: int) -> bytes:
    """The bytes of one image, from its row of the image index.

    Raises ImageError with the reason if they cannot be had, StorageError if a bucket or a server does not answer,
    UnsupportedFormatError for a kind of container that only a newer radio-cache knows.
    """
    member = key.removeprefix(container.prefix)
    match container.kind:
        case "folder":
            return read_place(f"{container.path.rstrip('/')}/{_inside(member)}")
        case "list":
            return read_place(listed_place(container.path, member))
        case "tar":
            if length < -1:  # a sparse member
                return expanded(read_place(container.path, offset, -length))
            return read_place(container.path, offset, length)
        case "parquet":
            from radio_cache.images.parquet import read_row

            return read_row(container.path, container.column, offset)
        case _:
            raise UnsupportedFormatError(
                f"image {key} lies in a container of kind '{container.kind}' ({container.path}), which this radio-cache "
                "does not know: install a newer one"
            )


def listed_place(list_file: str, entry: str) -> str:
    """Where a line of a list of files leads: a URL or an absolute path as it is, others from the list's own folder.

    At a URL, too, "." and ".." lead through folders. Raises ImageError for a URL of a kind that nothing here reads, and for a
    path that leads out of a bucket or a server.
    """
    local = _FILE_URL.match(entry)
    if local is not None:
        path = entry[local.end() :]
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
        rest = rest.partition("#")[0].partition("?")[0]
    host, *folders = rest.split("/")[:-1] or [rest]
    for part in entry.split("/"):
        if part == ".." and not folders:
            raise ImageError(f"cannot be read: {entry!r:.200} leads out of {scheme}://{host}")
        if part == "..":
            folders.pop()
        elif part != ".":
            folders.append(part)
    return f"{scheme}://{'/'.join([host, *folders])}"


def _inside(member: str) -> str:
    """A path below a folder, itself."""
    if member.startswith("/") or ".." in member.split("/"):
        raise ImageError(f"cannot be read: {member!r:.80} is no path below a folder")
    return member
