"""Files that lie elsewhere: in buckets and on web servers through obstore, on hf:// and its like through fsspec.

For images and what holds them; a cache's own files go through `storage`. Connections are kept for each process. What
fails for a moment is tried again, by obstore or here; a server that stays silent is an error after some seconds.
"""

import contextlib
import io
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar, final
from urllib.parse import unquote

from radio_cache.errors import ConfigError, LimitError, StorageError
from radio_cache.object_storage import ObjectStorage
from radio_cache.storage import BUCKETS

WEB = ("http", "https")

FILE_SYSTEMS = ("hf", "sftp", "ftp", "hdfs", "webhdfs", "oss", "memory")
"""What fsspec may be asked for: a cache from elsewhere names places, and some of what fsspec knows does more than reading."""

_PAUSES_S = (0.3, 1.0)
"""Before the second and the third try of what fsspec could not do."""

_KEPT_PLACES = 64

T = TypeVar("T")

Tell = Callable[[int], object]
"""Told how many more files were found, while a place is being listed; from any thread."""


@dataclass(frozen=True)
class RemoteStatus:
    """num_bytes: of the file. changed_ns: when it was changed last, since 1970; None where the server does not say."""

    num_bytes: int
    changed_ns: int | None


def fetch(url: str, *, most: int) -> bytes:
    """A whole file. Raises LimitError, before anything is read, if it has more than `most` bytes.

    Like all functions here it raises FileNotFoundError for a file that is not there, PermissionError for one page that
    a web server refuses, StorageError for a place that cannot be reached or does not accept the credentials,
    ConfigError for a kind of URL nobody knows.
    """
    place, path = _found(url)
    return place.fetch(path, most)


def fetch_range(url: str, offset: int, length: int) -> bytes:
    """`length` bytes from `offset` on; fewer where the file ends."""
    place, path = _found(url)
    return place.fetch_range(path, offset, length) if length else b""


def remote_status(url: str) -> RemoteStatus:
    """Size and age of a file, without reading it."""
    place, path = _found(url)
    return place.status(path)


def list_remote(url: str, tell: Tell = lambda _: None) -> list[tuple[str, int]]:
    """(path below the URL, bytes) of every file below a folder or prefix, sorted; none if nothing is there.

    tell: told of the files as they come, of a bucket page by page.
    """
    place, path = _found(url.rstrip("/"))
    below = f"{path}/" if path else ""
    return sorted((name.removeprefix(below), size) for name, size in place.list(path, tell) if name.startswith(below))


@final
class RemoteFile(io.RawIOBase):
    """A file at a URL as a file object: every read is a request for a range."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url, self._at, self._size = url, 0, remote_status(url).num_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._at))
        data = fetch_range(self._url, self._at, wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Place(ABC):
    """A bucket, a server, or another file system. Paths are relative to it."""

    @abstractmethod
    def fetch(self, path: str, most: int) -> bytes: ...

    @abstractmethod
    def fetch_range(self, path: str, offset: int, length: int) -> bytes: ...

    @abstractmethod
    def status(self, path: str) -> RemoteStatus: ...

    @abstractmethod
    def list(self, path: str, tell: Tell) -> list[tuple[str, int]]: ...


@final
class _Bucket(_Place):
    """What obstore reaches; also web servers, which list nothing."""

    def __init__(self, root: str) -> None:
        self._storage = ObjectStorage(root)
        self._is_web = root.startswith(WEB)

    def fetch(self, path: str, most: int) -> bytes:
        return self._asked(lambda: self._storage.read_at_most(path, most))

    def fetch_range(self, path: str, offset: int, length: int) -> bytes:
        return self._asked(lambda: bytes(self._storage.read_ranges(path, [(offset, length)])[0]))

    def status(self, path: str) -> RemoteStatus:
        size, changed = self._asked(lambda: self._storage.size_and_time(path))
        seconds = changed.timestamp()
        return RemoteStatus(size, round(seconds * 1e9) if seconds else None)

    def list(self, path: str, tell: Tell) -> list[tuple[str, int]]:
        if self._is_web:
            raise ConfigError(
                f"{self._storage.at(path)}: a web server does not list its folders: name tars, Parquet files or a list of files"
            )
        return list(self._storage.list_files(path, tell))

    def _asked(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except StorageError as exc:
            if self._is_web and isinstance(exc.__cause__, _refusals()):
                raise PermissionError(str(exc)) from exc
            raise


@final
class _FileSystem(_Place):
    """What fsspec reaches."""

    def __init__(self, root: str) -> None:
        import fsspec.core

        self._root = root
        try:
            self._fs: Any = fsspec.core.url_to_fs(root)[0]
        except ImportError as exc:
            raise ConfigError(f"{root}: a package is missing that reads such URLs: {exc}") from exc

    def fetch(self, path: str, most: int) -> bytes:
        size = self.status(path).num_bytes
        if size > most:
            raise LimitError(f"{self._root}/{path} has {size} bytes; the longest that can be true has {most}")
        return bytes(self._tried(path, lambda: self._fs.cat_file(self._at(path))))

    def fetch_range(self, path: str, offset: int, length: int) -> bytes:
        return bytes(self._tried(path, lambda: self._fs.cat_file(self._at(path), start=offset, end=offset + length)))

    def status(self, path: str) -> RemoteStatus:
        found: dict[str, Any] = self._tried(path, lambda: self._fs.info(self._at(path)))
        if found["type"] != "file":
            raise FileNotFoundError(f"{self._root}/{path} is a {found['type']}")
        return RemoteStatus(int(found["size"]), None)

    def list(self, path: str, tell: Tell) -> list[tuple[str, int]]:
        found: dict[str, Any] = self._tried(path, lambda: self._fs.find(self._at(path), detail=True))
        tell(len(found))
        root = str(self._fs._strip_protocol(self._root)).rstrip("/") + "/"
        return [(name.removeprefix(root), int(info["size"])) for name, info in found.items()]

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _tried(self, path: str, ask: Callable[[], T]) -> T:
        for pause in (*_PAUSES_S, None):
            with self._named(path, last=pause is None):
                return ask()
            time.sleep(pause or 0)
        raise AssertionError

    @contextlib.contextmanager
    def _named(self, path: str, *, last: bool) -> Generator[None]:
        """Errors that waiting does not help, and the last of the others, in our words."""
        try:
            yield
        except FileNotFoundError:
            raise
        except PermissionError as exc:
            raise StorageError(
                f"cannot read {self._at(path)}: these credentials may not do this ({_line(exc)})"
            ) from exc
        except Exception as exc:  # every file system behind fsspec has errors of its own
            if last:
                raise StorageError(
                    f"cannot read {self._at(path)}: {_line(exc)}: check the network and the credentials, and run the same "
                    "command again"
                ) from exc


def _found(url: str) -> tuple[_Place, str]:
    """The place that holds a URL, and the path below it."""
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    host, _, path = rest.partition("/")
    if scheme in WEB:
        path = unquote(path)  # the library quotes it again
        if "?" in rest or "#" in rest:  # a path with a query is not below anything
            host, path = rest.partition("#")[0], ""
    return _place(scheme, host, os.getpid()), path


@lru_cache(maxsize=_KEPT_PLACES)
def _place(scheme: str, host: str, process: int) -> _Place:  # connections do not survive a fork
    root = f"{scheme}://{host}"
    if scheme in (*BUCKETS, *WEB):
        return _Bucket(root)
    if scheme in FILE_SYSTEMS and "::" not in host:
        return _FileSystem(root)
    raise ConfigError(f"{root}: nothing here reads such URLs; known are {', '.join((*BUCKETS, *WEB, *FILE_SYSTEMS))}")


def _refusals() -> tuple[type[Exception], ...]:
    from obstore import exceptions

    return (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)


def _line(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}".splitlines()[0][:200]
