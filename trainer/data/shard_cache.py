"""Whole shards of codes in bounded memory, for object stores: one large request instead of many small ones."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from radio_cache.reader import CachedTeacher

DEFAULT_BYTES = 2 << 30


@final
class ShardCache:
    """Reads codes (`trainer.data.crops.CodeReader`) through the shards read last. Safe to share between threads.

    usable: all rows that may be asked for, sorted; a shard is read with all of its own. max_bytes: of all shards kept; the
    one being used is kept whatever its size.
    """

    def __init__(self, usable: NDArray[np.int64], shard_images: int, max_bytes: int = DEFAULT_BYTES) -> None:
        self._usable, self._shard_images, self._max_bytes = usable, shard_images, max_bytes
        self._shards: OrderedDict[tuple[str, int, int], Future[NDArray[Any]]] = OrderedDict()
        self._lock = threading.Lock()
        self.shards_read = 0

    def __call__(self, teacher: CachedTeacher, rows: NDArray[np.int64], out: NDArray[Any], view: int = 0) -> None:
        shards = rows // self._shard_images
        for shard in np.unique(shards):
            first, last = np.searchsorted(self._usable, [shard * self._shard_images, (shard + 1) * self._shard_images])
            there = self._usable[first:last]
            codes = self._shard((teacher.name, view, int(shard)), lambda there=there: teacher.codes(there, view=view))
            places = np.flatnonzero(shards == shard)
            out[places] = codes[np.searchsorted(there, rows[places])]

    def _shard(self, key: tuple[str, int, int], read: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        with self._lock:
            found = self._shards.get(key)
            if mine := found is None:
                found = self._shards[key] = Future()
                self.shards_read += 1
            self._shards.move_to_end(key)
        if mine:
            try:
                found.set_result(read())
            except BaseException as exc:
                found.set_exception(exc)
                with self._lock:
                    self._shards.pop(key, None)
                raise
            self._drop_oldest()
        return found.result()

    def _drop_oldest(self) -> None:
        with self._lock:
            done = [(key, future.result().nbytes) for key, future in self._shards.items() if future.done()]
            total = sum(size for _, size in done)
            for key, size in done[:-1]:
                if total <= self._max_bytes:
                    return
                del self._shards[key]
                total -= size
