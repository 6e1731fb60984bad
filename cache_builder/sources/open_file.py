"""A source that is one file, opened for reading: a local path or a URL."""

import io
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from radio_cache.errors import ImageError, SourceError
from radio_cache.images.remote import RemoteFile, fetch
from radio_cache.storage.base import is_url

_REQUEST_BYTES = 1 << 16
"""Smallest range that is requested of a bucket. The latency of a request costs as much as some hundred kilobytes."""

_MAX_LIST_BYTES = 1 << 32


@contextmanager
def open_source(path_or_url: str) -> Generator[BinaryIO]:
    """Open the file at a path or a URL.

    Raises:
        SourceError: the file cannot be opened or read.
        StorageError: a bucket or a server does not answer.
    """
    with _source_errors(path_or_url):
        if is_url(path_or_url):
            # RemoteFile has all methods that readers use, but does not derive from RawIOBase.
            with io.BufferedReader(RemoteFile(path_or_url), _REQUEST_BYTES) as remote:
                yield cast(BinaryIO, remote)
        else:
            with Path(path_or_url).open("rb") as file:
                yield file


def read_source(path_or_url: str) -> bytes:
    """Return the whole file at a path or a URL. Web servers without support for ranges work, too.

    Raises:
        SourceError: the file cannot be opened or read.
        StorageError: a bucket or a server does not answer.
    """
    with _source_errors(path_or_url):
        # Whole, and not through RemoteFile: lists are small, and many web servers refuse ranges.
        if is_url(path_or_url):
            return fetch(path_or_url, max_bytes=_MAX_LIST_BYTES)
        return Path(path_or_url).read_bytes()


@contextmanager
def _source_errors(path_or_url: str) -> Generator[None]:
    """Convert errors of reading one file into a SourceError that names it."""
    try:
        yield
    except FileNotFoundError as exc:
        raise SourceError(f"{path_or_url} does not exist (any more)") from exc
    except ImageError as exc:  # the URL itself is invalid
        raise SourceError(f"{path_or_url} {exc}") from exc
    except OSError as exc:
        raise SourceError(f"{path_or_url} cannot be read: {exc.strerror or exc}") from exc
