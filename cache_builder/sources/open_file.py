"""A source that is one file, opened for reading: on a disk or at a URL."""

import io
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from radio_cache.errors import ImageError, SourceError
from radio_cache.images.remote import RemoteFile, fetch
from radio_cache.storage.base import is_url

_REQUEST_BYTES = 1 << 16
"""What a request to a bucket brings at least. Waiting for one costs as much as some hundred kilobytes."""


_MAX_LIST_BYTES = 1 << 32


@contextmanager
def open_source(place: str) -> Generator[BinaryIO]:
    """The file at a path or a URL. Raises SourceError if it cannot be opened or read; StorageError for a bucket or a
    server that does not answer."""
    with _named(place):
        if is_url(place):
            # Its raw file is one by all that readers ask of it, and not one by the letter.
            with io.BufferedReader(RemoteFile(place), _REQUEST_BYTES) as remote:
                yield cast(BinaryIO, remote)
        else:
            with Path(place).open("rb") as file:
                yield file


def read_source(place: str) -> bytes:
    """Return the whole file at a path or a URL, also of a web server that gives no parts of files. Raises as `open_source`."""
    with _named(place):
        return fetch(place, most=_MAX_LIST_BYTES) if is_url(place) else Path(place).read_bytes()


@contextmanager
def _named(place: str) -> Generator[None]:
    try:
        yield
    except FileNotFoundError as exc:
        raise SourceError(f"{place} does not exist (any more)") from exc
    except ImageError as exc:  # an address that nothing can have
        raise SourceError(f"{place} {exc}") from exc
    except OSError as exc:
        raise SourceError(f"{place} cannot be read: {exc.strerror or exc}") from exc
