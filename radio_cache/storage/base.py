"""The interface of storage: named byte strings under one root, a folder or the prefix of a bucket.

`open_storage` chooses by the form of the path or URL. Every write is whole and atomic: after a power cut or a kill a file has
its old content or the new one. Object stores are accessed through obstore, imported on first use.
"""

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from radio_cache.errors import LimitError, StorageError

# Pieces of a file, written one after another without joining them.
Part = bytes | bytearray | memoryview

URL_PATTERN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# Schemes that obstore opens; s3a, adl and abfs are Hadoop's names.
BUCKETS = ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss")


def is_url(place: str | Path) -> bool:
    """Return whether a place is written as a URL rather than as a path."""
    return isinstance(place, str) and URL_PATTERN.match(place) is not None


def absolute_path_or_url(place: str | Path) -> str:
    """Return a URL as it is, and a path from the root."""
    return str(place) if is_url(place) else str(Path(place).resolve())


class Storage(ABC):
    """Named byte strings under one root. Paths are relative to it, separated by '/', and never climb out of it.

    Missing files raise FileNotFoundError. All other errors of the system or the bucket become a StorageError that names
    the path or URL and the cure. Safe to share between threads and to pickle.
    """

    url: str
    """What the user typed, for messages; of local storage a plain path."""
    is_local: ClassVar[bool]

    @abstractmethod
    def read(self, path: str) -> bytes:
        """Return the whole file."""

    @abstractmethod
    def zarr_store(self) -> Any:
        """Return what zarr-python reads the same files through: a path, or a store of its own."""

    @abstractmethod
    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes | memoryview]:
        """Return the bytes of each (offset, length); fewer where the file ends. Coalesced and parallel on object stores."""

    @abstractmethod
    def read_tail(self, path: str, length: int) -> tuple[bytes, int]:
        """Return the last `length` bytes, all of them if the file is shorter, and the size of the file."""

    @abstractmethod
    def size(self, path: str) -> int | None:
        """Return bytes in a file, None if it is not there."""

    @abstractmethod
    def write(self, path: str, parts: Sequence[Part]) -> None:
        """Write a file of these parts, whole and atomic: after a crash it has its old content or the new one."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> bool:
        """Like `write`, but only if there is no such file: False if there is. Of several writers exactly one gets True.

        Where an answer of a bucket was lost and the request repeated, the winner may get False too.
        """

    @abstractmethod
    def write_tree(self, folder: str, files: Iterable[tuple[str, bytes]], *, last: str) -> bool:
        """Write a new folder of (path below it, content), atomically for a reader that opens `last` first.

        Returns:
            False, with nothing changed, if another process was faster.
        """

    @abstractmethod
    def list_files(self, folder: str = "") -> Iterator[tuple[str, int]]:
        """Yield (path below the root, bytes) of every file below a folder, sorted by path; none if it is not there."""

    @abstractmethod
    def list_folders(self, folder: str = "") -> list[str]:
        """Return names of the folders directly below one, sorted."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove a file; no error if it is gone already."""

    @abstractmethod
    def delete_tree(self, folder: str) -> None:
        """Remove a folder with everything in it; no error if it is gone already."""

    @abstractmethod
    def remove_leftovers(self) -> int:
        """Delete what killed processes of this machine left half-written; returns how many there were."""

    @contextlib.contextmanager
    def locked(self, folder: str, *, shared: bool = False, wait: bool = True) -> Generator[bool]:
        """Lock a folder against other processes of this machine and yield whether this one has the lock.

        Buckets and absent folders have no lock, so every process gets it.

        Args:
            folder: below the root.
            shared: hold it together with other shared holders.
            wait: until others release it; else yield False at once.
        """
        del folder, shared, wait
        yield True

    def read_at_most(self, path: str, max_bytes: int) -> bytes:
        """Return the whole file. Raises LimitError for one of more than `max_bytes` bytes, which are not read."""
        # The last `max_bytes` bytes are the whole file, unless it has more.
        data, size = self.read_tail(path, max_bytes)
        if size > max_bytes:
            raise self._too_large(path, size, max_bytes)
        return data

    def _too_large(self, path: str, size: int, max_bytes: int) -> LimitError:
        return LimitError(f"{self.at(path)} has {size} bytes; the longest that can be true has {max_bytes}")

    def exists(self, path: str) -> bool:
        return self.size(path) is not None

    def local_path(self, path: str = "") -> Path:
        """Return the file in the file system. Raises StorageError for storage that is not local."""
        raise StorageError(f"{self.at(path)} is not on a local disk, and this works on local files only: copy it first")

    def at(self, path: str = "") -> str:
        """Return the name of a file for a message."""
        return f"{self.url.rstrip('/')}/{path}" if path else self.url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"
