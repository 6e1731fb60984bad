"""A process's cache of an array's shard indices, and of a bounded number of open files."""

import os
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from radio_cache.format.checksums import CRC_BYTES

Key = tuple[int, int]
"""View and shard."""

MAX_OPEN_FILES = 256
"""Descriptors one array keeps open, of a process's 1,024 or so."""

MAX_KEPT_SHARDS = 1 << 15
"""Indexes kept of one array: of shards of 128 images at most 64 MB."""

ABSENT_CHUNK, OUTSIDE = -1, -2
"""In place of an offset: the chunk is not there; the index places it where it cannot be."""


@dataclass(frozen=True, kw_only=True)
class ShardLayout:
    """The common layout of all shards of an array (views, n, *row), whose inner chunk is one row of one view.

    Attributes:
        row_axes: number of axes of a row.
        row_bytes: size of a decoded row.
        shard_images: rows of a shard.
        zstd: whether chunks are compressed.
    """

    row_axes: int
    row_bytes: int
    shard_images: int
    zstd: bool

    @property
    def max_chunk_bytes(self) -> int:
        """The longest chunk there can be, with its checksum. What zstd cannot compress grows a little."""
        # At least ZSTD_compressBound, which is n + n / 256 + 64 at most.
        return self.row_bytes + ((self.row_bytes >> 7) + 64 if self.zstd else 0) + CRC_BYTES

    def key(self, view: int, shard: int) -> str:
        """Path of a shard file below the array."""
        return f"c/{view}/{shard}" + "/0" * self.row_axes


class OpenFile:
    """An open descriptor that is closed with its last reference, so that eviction cannot close it during a read."""

    def __init__(self, path: str) -> None:
        # Set first, because `__del__` also runs when the open fails.
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


@dataclass(slots=True)
class ShardIndex:
    """A shard's index: where each chunk begins (or ABSENT_CHUNK, OUTSIDE), its length with checksum, and who was checked.

    identity: of the file the index is of; lengths: None where all are row_bytes + CRC_BYTES.
    """

    offsets: "array[int]"  # reading one element of a NumPy array costs five times as much
    lengths: "array[int] | None"
    checked: bytearray
    identity: tuple[int, ...]


class ShardIndexCache:
    """The cached indices and descriptors of an array, least recently used first.

    Attributes:
        opened: descriptor and index of the shards that have both.
    """

    def __init__(self) -> None:
        # A forked child inherits locks that no thread will release, so readers compare the process.
        self.process = os.getpid()
        self.lock = threading.Lock()
        self.shards: OrderedDict[Key, ShardIndex] = OrderedDict()
        self.files: OrderedDict[Key, OpenFile] = OrderedDict()
        self.opened: dict[Key, tuple[OpenFile, ShardIndex]] = {}

    @property
    def crowded(self) -> bool:
        """Return whether who was used last matters soon."""
        # Half full: until then nothing is evicted soon, and the order need not be maintained.
        return 2 * len(self.files) > MAX_OPEN_FILES or 2 * len(self.shards) > MAX_KEPT_SHARDS

    def shard(self, key: Key) -> ShardIndex | None:
        if self.crowded:
            self.use([key])
        return self.shards.get(key)

    def use(self, keys: Iterable[Key]) -> None:
        """Mark these shards as used last."""
        with self.lock:
            for key in keys:
                for cached in (self.files, self.shards):
                    if key in cached:
                        # The least recently used entry is the first, which is evicted.
                        cached.move_to_end(key)

    def forget(self, key: Key) -> None:
        """Look at the file anew next time: it may be repaired, or finished, by then."""
        with self.lock:
            self.shards.pop(key, None)
            file = self.files.pop(key, None)
            opened = self.opened.pop(key, None)
        del file, opened  # closed here, outside the lock

    def keep_shard(self, key: Key, shard: ShardIndex) -> ShardIndex:
        with self.lock:
            self._keep_shard(key, shard)
        return shard

    def keep_opened(self, key: Key, file: OpenFile, shard: ShardIndex) -> tuple[OpenFile, ShardIndex]:
        with self.lock:
            self._keep_shard(key, shard)
            replaced = self.opened.get(key)
            self.files[key] = file
            self.opened[key] = (file, shard)
            # Closed after the lock is released, by its last reference.
            evicted = None
            if len(self.files) > MAX_OPEN_FILES:
                oldest, _ = self.files.popitem(last=False)
                evicted = self.opened.pop(oldest, None)
        del evicted, replaced  # closes the files, outside the lock, unless a thread still reads from them
        return file, shard

    def _keep_shard(self, key: Key, shard: ShardIndex) -> None:
        self.shards[key] = shard
        if len(self.shards) > MAX_KEPT_SHARDS:
            oldest, _ = self.shards.popitem(last=False)
            self.files.pop(oldest, None)
            self.opened.pop(oldest, None)
