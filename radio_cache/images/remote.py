"""Files that lie elsewhere: in buckets through obstore, on web servers, on hf:// and its like through fsspec.

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
from datetime import timedelta
from functools import lru_cache
from typing import Any, ClassVar, TypeVar, final

from radio_cache.errors import ConfigError, ImageError, LimitError, StorageError
from radio_cache.images.web import (
    WEB,
    RefusedError,
    ServerError,
    UnreachableError,
    can_connect,
    fetch_page,
    fetch_page_range,
    page_status,
)
from radio_cache.storage.base import BUCKETS
from radio_cache.storage.buckets import ObjectStorage

FILE_SYSTEMS = ("hf", "sftp", "ftp", "hdfs", "webhdfs", "oss", "memory")
"""Protocols that may be opened through fsspec. An untrusted cache names URLs, and some protocols of fsspec do more than read."""

_PAUSES_S = (0.3, 1.0)
"""Pauses before the second and the third try of a call that failed in fsspec."""

_PAUSES_IF_REFUSED_S = (0.2, 0.5)
"""Pauses before the second and the third try of a file that is missing or refused. Short, as lists of pages name many of them."""

# Buckets and servers with open connections.
_KEPT_PLACES = 64

T = TypeVar("T")

OnListed = Callable[[int], object]
"""Called with the number of further files while a listing progresses, from any thread."""


@dataclass(frozen=True)
class RemoteStatus:
    """The status of a remote file.

    Attributes:
        num_bytes: size of the file; None if the server does not send it.
        changed_ns: time of the last change since 1970; None if the server does not send it.
    """

    num_bytes: int | None
    changed_ns: int | None


def is_known_url(url: str) -> bool:
    """Return whether anything here reads URLs of this kind."""
    scheme, _, rest = url.partition("://")
    # fsspec chains protocols by "::" (zip::file://...), which would lead around FILE_SYSTEMS.
    return scheme.lower() in (*BUCKETS, *WEB) or (scheme.lower() in FILE_SYSTEMS and "::" not in rest)


def fetch(url: str, *, max_bytes: int) -> bytes:
    """Return a whole file.

    Like all functions here it tries again what is not there or is refused for a moment. Before it blames one file, it makes sure
    that its server or bucket still gives the file that was read from it last.

    Raises:
        LimitError: it has more than `max_bytes` bytes; they are not read.
        FileNotFoundError: there is no such file.
        PermissionError: the server or bucket refuses this one file.
        ImageError: no file can have such an address.
        StorageError: a server or bucket cannot be reached, is in trouble, or does not accept the credentials.
        ConfigError: nothing here reads such URLs.
    """
    place, path = _found(url)
    return place.asked(path, lambda: place.fetch(path, max_bytes))


def fetch_range(url: str, offset: int, length: int) -> bytes:
    """Return `length` bytes from `offset` on; fewer where the file ends. Raises as `fetch` does."""
    place, path = _found(url)
    return place.asked(path, lambda: place.fetch_range(path, offset, length)) if length else b""


def remote_status(url: str) -> RemoteStatus:
    """Return size and age of a file, without reading it. Raises as `fetch` does."""
    place, path = _found(url)
    return place.asked(path, lambda: place.status(path))


def list_remote(url: str, tell: OnListed = lambda _: None) -> list[tuple[str, int]]:
    """Return (path below the URL, bytes) of every file below a folder or prefix, sorted.

    Args:
        url: of the folder or prefix.
        tell: called with the number of files as they arrive, page by page for a bucket.
    """
    place, path = _found(url.rstrip("/"))
    below = f"{path}/" if path else ""
    return sorted((name.removeprefix(below), size) for name, size in place.list(path, tell) if name.startswith(below))


@final
class RemoteFile(io.RawIOBase):
    """A file at a URL as a file object: every read is a request for a range."""

    def __init__(self, url: str) -> None:
        super().__init__()
        num_bytes = remote_status(url).num_bytes
        if num_bytes is None:
            raise StorageError(
                f"cannot read parts of {url}: its server does not say how long it is: fetch it, and name the copy"
            )
        self._url, self._at, self._size = url, 0, num_bytes

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
        num_bytes = max(0, min(len(buffer), self._size - self._at))
        data = fetch_range(self._url, self._at, num_bytes)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Place(ABC):
    """A bucket, a server, or another file system. Paths are relative to it."""

    _max_refusals = 1
    """Number of refusals, without one successful read, after which the place counts as refusing everything."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._read_last: str | None = None
        self._refusals = 0

    @abstractmethod
    def fetch(self, path: str, max_bytes: int) -> bytes: ...

    @abstractmethod
    def fetch_range(self, path: str, offset: int, length: int) -> bytes: ...

    @abstractmethod
    def status(self, path: str) -> RemoteStatus: ...

    @abstractmethod
    def list(self, path: str, tell: OnListed) -> list[tuple[str, int]]: ...

    def at(self, path: str) -> str:
        """Return the name of a file for a message."""
        return f"{self.root}/{path}"

    def asked(self, path: str, ask: Callable[[], T]) -> T:
        """Return the result of `ask` for a file.

        Raises:
            FileNotFoundError: if the file does not exist.
            PermissionError: if the file is refused.
            StorageError: if the whole bucket or server fails.
        """
        error: Exception | None = None
        for pause_s in (0.0, *_PAUSES_IF_REFUSED_S):
            time.sleep(pause_s)
            try:
                answer = ask()
            except (FileNotFoundError, PermissionError) as exc:
                error = exc
                continue
            except (ServerError, UnreachableError) as exc:  # `web` has retried these already
                error = exc
                break
            self.note_read(path)
            return answer
        assert error is not None
        raise self._blamed(path, error) from error

    def note_read(self, path: str) -> None:
        """Remember a file that was read."""
        # Without a lock: any path that was read serves, whichever thread sets it last.
        self._read_last, self._refusals = path, 0

    def others_are_read(self) -> bool:
        """Return whether other places of this kind can be read, so that the network is fine."""
        return False

    def _blamed(self, path: str, error: Exception) -> Exception:
        """Return the error to raise for a missing or refused file, after a look at a file that was read before."""
        good = self._read_last
        # The server answered before, so it is down now, and the run stops.
        if isinstance(error, UnreachableError) and good is not None:
            return error
        # The server never gave another file. If other servers can be read, this one is at fault, not the network.
        if (good is None or good == path) and isinstance(error, StorageError):
            return RefusedError(str(error)) if self.others_are_read() else error
        # One refused file could be a refusal of everything, so refusals are counted.
        if good is None or good == path:
            self._refusals += not isinstance(error, FileNotFoundError)
            if isinstance(error, PermissionError) and self._refusals >= self._max_refusals:
                return StorageError(
                    f"cannot read {self.at(path)}: {self.root} has refused all that was asked of it so far: {error}"
                )
            return error
        try:
            # The file that was read last decides: if it can be read now, only the other file is at fault.
            self.status(good)
        except (FileNotFoundError, PermissionError, StorageError) as exc:
            return StorageError(
                f"cannot read {self.at(path)} ({error}): {self.at(good)}, which was read before, cannot be had now either: "
                f"run the same command again when it can ({_line(exc)})"
            )
        return RefusedError(str(error)) if isinstance(error, ServerError) else error


@final
class _Bucket(_Place):
    """A bucket, read by obstore."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._storage = ObjectStorage(root, check=_object_key)

    def fetch(self, path: str, max_bytes: int) -> bytes:
        return self._named(lambda: self._storage.read_at_most(path, max_bytes))

    def fetch_range(self, path: str, offset: int, length: int) -> bytes:
        return self._named(lambda: bytes(self._storage.read_ranges(path, [(offset, length)])[0]))

    def status(self, path: str) -> RemoteStatus:
        size, changed = self._named(lambda: self._storage.size_and_time(path))
        seconds = changed.timestamp()
        # 1970 stands for a server that does not send a time.
        return RemoteStatus(size, round(seconds * 1e9) if seconds else None)

    def list(self, path: str, tell: OnListed) -> list[tuple[str, int]]:
        from obstore import exceptions

        try:
            return list(self._storage.list_files(path, tell))
        except StorageError as exc:
            if not isinstance(exc.__cause__, exceptions.InvalidPathError):
                raise
            # One key that obstore cannot express ends its listing; Arrow lists the names as they are.
            listed = _listed_by_arrow(self.root, path, self._storage.endpoint(), exc)
        tell(len(listed))
        return listed

    def _named(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except StorageError as exc:
            # As a PermissionError, so that `asked` tries again and compares with another object.
            if isinstance(exc.__cause__, _refusals()):
                raise PermissionError(str(exc)) from exc
            raise


@final
class _WebServer(_Place):
    """A web server, which lists nothing. Paths are what follows the host, as it was written."""

    # Lists of pages contain single pages that are refused, so one refusal proves little.
    _max_refusals = 3
    _read_anywhere: "ClassVar[tuple[_WebServer, str] | None]" = None
    """The page that was read last, of any server."""

    def note_read(self, path: str) -> None:
        super().note_read(path)
        _WebServer._read_anywhere = (self, path)

    def others_are_read(self) -> bool:
        # A list of pages all over the web names servers that are gone: that of one image must not end a build.
        if _WebServer._read_anywhere is None or _WebServer._read_anywhere[0].root == self.root:
            return False
        other, path = _WebServer._read_anywhere
        # By a new connection: an open one may outlive the network for a while.
        if not can_connect(other.at(path)):
            return False
        try:
            other.status(path)
        except (FileNotFoundError, PermissionError, StorageError):
            return False
        return True

    def at(self, path: str) -> str:
        return self.root + path

    def fetch(self, path: str, max_bytes: int) -> bytes:
        return fetch_page(self.at(path), max_bytes)

    def fetch_range(self, path: str, offset: int, length: int) -> bytes:
        return fetch_page_range(self.at(path), offset, length)

    def status(self, path: str) -> RemoteStatus:
        answer = page_status(self.at(path))
        return RemoteStatus(answer.num_bytes, answer.changed_ns)

    def list(self, path: str, tell: OnListed) -> list[tuple[str, int]]:
        raise ConfigError(
            f"{self.at(path)}: a web server does not list its folders: name tars, Parquet files or a list of files"
        )


@final
class _FileSystem(_Place):
    """A file system that fsspec reads."""

    def __init__(self, root: str) -> None:
        import fsspec.core

        super().__init__(root)
        try:
            self._fs: Any = fsspec.core.url_to_fs(root)[0]
        except ImportError as exc:
            raise ConfigError(f"{root}: a package is missing that reads such URLs: {exc}") from exc

    def fetch(self, path: str, max_bytes: int) -> bytes:
        # `cat_file` has no limit of its own, so the size is requested first.
        size = self.status(path).num_bytes or 0
        if size > max_bytes:
            raise LimitError(f"{self.at(path)} has {size} bytes; the longest that can be true has {max_bytes}")
        return bytes(self._tried(path, lambda: self._fs.cat_file(self.at(path))))

    def fetch_range(self, path: str, offset: int, length: int) -> bytes:
        return bytes(self._tried(path, lambda: self._fs.cat_file(self.at(path), start=offset, end=offset + length)))

    def status(self, path: str) -> RemoteStatus:
        info: dict[str, Any] = self._tried(path, lambda: self._fs.info(self.at(path)))
        if info["type"] != "file":
            raise FileNotFoundError(f"{self.root}/{path} is a {info['type']}")
        return RemoteStatus(int(info["size"]), None)

    def list(self, path: str, tell: OnListed) -> list[tuple[str, int]]:
        infos: dict[str, Any] = self._tried(path, lambda: self._fs.find(self.at(path), detail=True))
        tell(len(infos))
        # fsspec returns names without the protocol.
        root = str(self._fs._strip_protocol(self.root)).rstrip("/") + "/"
        return [(name.removeprefix(root), int(info["size"])) for name, info in infos.items()]

    def _tried(self, path: str, ask: Callable[[], T]) -> T:
        for pause in (*_PAUSES_S, None):
            with self._named(path, last=pause is None):
                return ask()
            time.sleep(pause or 0)
        raise AssertionError

    @contextlib.contextmanager
    def _named(self, path: str, *, last: bool) -> Generator[None]:
        """Translate errors that a retry cannot cure, and that of the last try. The others are swallowed: `_tried` goes on."""
        try:
            yield
        except FileNotFoundError:
            raise
        except PermissionError as exc:
            raise StorageError(
                f"cannot read {self.at(path)}: these credentials may not do this ({_line(exc)})"
            ) from exc
        except Exception as exc:  # every file system behind fsspec has errors of its own
            if last:
                raise StorageError(
                    f"cannot read {self.at(path)}: {_line(exc)}: check the network and the credentials, and run the same "
                    "command again"
                ) from exc


def _listed_by_arrow(root: str, path: str, endpoint: str, error: StorageError) -> list[tuple[str, int]]:
    """Return (key, bytes) of the objects below a prefix of a bucket. error: to raise where Arrow knows no such buckets."""
    from pyarrow import fs

    scheme, _, bucket = root.partition("://")
    files: Any
    try:
        if scheme in ("s3", "s3a"):
            files = fs.S3FileSystem(
                anonymous=os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true"),
                region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None,
                endpoint_override=endpoint or None,
                # Seconds, as in storage/buckets.py.
                connect_timeout=4,
                request_timeout=20,
            )
        elif scheme == "gs":
            files = fs.GcsFileSystem(retry_time_limit=timedelta(seconds=20))
        else:
            raise StorageError(
                f"{error}: copy the object of that key to another one, or name the images in a list (.txt)"
            )
        listed: Any = files.get_file_info(fs.FileSelector(f"{bucket}/{path}".rstrip("/"), recursive=True))
    except (OSError, ValueError) as exc:
        raise StorageError(f"cannot list {root}/{path}: {_line(exc)}") from exc
    return [(info.path.removeprefix(f"{bucket}/"), int(info.size)) for info in listed if info.type == fs.FileType.File]


def _object_key(path: str) -> str:
    """Return the key itself. Raises ImageError for one that the library for buckets cannot express."""
    parts = path.split("/") if path else []
    if any(part in ("", ".", "..") for part in parts) or any(map(_is_odd, path)):
        raise ImageError(
            f"cannot be read: no object can be reached by the key {path!r:.200}: parts that are empty, '.' or '..', and control "
            "characters, are beyond the library for buckets: copy the object to another key"
        )
    return path


def _is_odd(character: str) -> bool:
    # Control characters and lone surrogates.
    return character < " " or character == "\x7f" or "\ud800" <= character <= "\udfff"


def _found(url: str) -> tuple[_Place, str]:
    """Return the place that holds a URL, and the path below it; of a web page all that follows the host."""
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    if scheme in WEB:
        # An address may have a query without a path. All that follows the host goes out as written.
        end = next((position for position, mark in enumerate(rest) if mark in "/?#\\"), len(rest))
        return _place(scheme, rest[:end], os.getpid(), ()), rest[end:]
    host, _, path = rest.partition("/")
    return _place(scheme, host, os.getpid(), _settings()), path


def _settings() -> tuple[tuple[str, str], ...]:
    """Return the environment variables that bucket stores are opened with: a renewed token or another endpoint counts at once."""
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith(("AWS_", "GOOGLE_", "AZURE_"))))


@lru_cache(maxsize=_KEPT_PLACES)
def _place(scheme: str, host: str, process: int, settings: tuple[tuple[str, str], ...]) -> _Place:
    del process, settings  # parts of the key: connections survive neither a fork nor new credentials
    root = f"{scheme}://{host}"
    if scheme in WEB:
        return _WebServer(root)
    if scheme in BUCKETS:
        return _Bucket(root)
    if scheme in FILE_SYSTEMS and "::" not in host:
        return _FileSystem(root)
    raise ConfigError(f"{root}: nothing here reads such URLs; known are {', '.join((*BUCKETS, *WEB, *FILE_SYSTEMS))}")


def _refusals() -> tuple[type[Exception], ...]:
    from obstore import exceptions

    return (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)


def _line(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}".splitlines()[0][:200]
