"""A cache of whole shards of codes in bounded memory: object stores are fast at a few large requests."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from radio_cache.reader import CachedTeacher

DEFAULT_BYTES = 2 << 30
"""Memory for whole shards: 2 GiB."""


@final
class ShardCache:
    """A `trainer.data.crops.CodeReader` that keeps the most recently used shards in memory. Threads may share it.

    Args:
        usable: all rows that may be read, sorted; a shard is read with all of these that lie in it.
        shard_images: images in a shard.
        max_bytes: memory for all shards; the most recent shard stays whatever its size.
    """

    def __init__(self, usable: NDArray[np.int64], shard_images: int, max_bytes: int = DEFAULT_BYTES) -> None:
        self._usable, self._shard_images, self._max_bytes = usable, shard_images, max_bytes
        self._shards: OrderedDict[tuple[str, int, int], Future[NDArray[Any]]] = OrderedDict()
        self._lock = threading.Lock()
        self.shards_read = 0

    def __call__(self, teacher: CachedTeacher, rows: NDArray[np.int64], out: NDArray[Any], view: int = 0) -> None:
        """Copy the codes (b, *row_shape) of rows (b,) into `out`."""
        shards = rows // self._shard_images
        for shard in np.unique(shards):
            first, last = np.searchsorted(self._usable, [shard * self._shard_images, (shard + 1) * self._shard_images])
            shard_rows = self._usable[first:last]
            codes = self._shard(
                (teacher.name, view, int(shard)), lambda shard_rows=shard_rows: teacher.codes(shard_rows, view=view)
            )
            positions = np.flatnonzero(shards == shard)
            out[positions] = codes[np.searchsorted(shard_rows, rows[positions])]

    def _shard(self, key: tuple[str, int, int], read: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        # The first thread to need a shard reads it, outside of the lock; the others wait for its future.
        with self._lock:
            codes = self._shards.get(key)
            if is_reader := codes is None:
                codes = self._shards[key] = Future()
                self.shards_read += 1
            self._shards.move_to_end(key)
        if is_reader:
            try:
                codes.set_result(read())
            except BaseException as exc:
                codes.set_exception(exc)
                with self._lock:
                    self._shards.pop(key, None)
                raise
            self._drop_oldest()
        return codes.result()

    def _drop_oldest(self) -> None:
        with self._lock:
            completed = [(key, future.result().nbytes) for key, future in self._shards.items() if future.done()]
            total = sum(size for _, size in completed)
            for key, size in completed[:-1]:
                if total <= self._max_bytes:
                    return
                del self._shards[key]
                total -= size
