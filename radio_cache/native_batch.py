"""Uncompressed rows of files by compiled code: one call of it reads and checks many rows while Python does other things.

`radio_cache._rows` is built where there is a C compiler and an x86-64 processor. Without it `LocalBatch` does the same in
Python, which is half as fast with two threads: they take turns at the interpreter for every row.
"""

import os
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import CorruptShardError
from radio_cache.known_shards import ABSENT_CHUNK, KnownShard, OpenFile
from radio_cache.shard_batches import LocalBatch

try:
    from radio_cache import _rows as compiled
except ImportError:
    compiled: Any = None

AVAILABLE: bool = compiled is not None and not os.environ.get("RADIO_CACHE_PURE_PYTHON")
"""Whether compiled code reads rows. The environment's RADIO_CACHE_PURE_PYTHON=1 does without, to compare."""

Ints = NDArray[np.integer[Any]]

_NOTHING = array("q")

_SLICE_BYTES = 1 << 20
"""What a thread reads at a time: enough that taking turns at the interpreter costs nothing, little enough to share evenly."""


class NativeBatch(LocalBatch):
    """First all rows are looked up, then slices of them are read, whatever shards they are of."""

    def unknown(self, shards: NDArray[np.int64]) -> list[int]:
        """Which of these shards cannot be looked up without reading."""
        known, view = self._known, self._view
        found = dict.fromkeys(shards.tolist())
        return [shard for shard in found if known.file((view, shard)) is None or known.shard((view, shard)) is None]

    def look_up(self, shard: int) -> tuple[OpenFile, KnownShard] | None:
        """A shard's file and index; None if there is no such file."""
        try:
            return self._opened(shard)
        except FileNotFoundError:
            return None
        except CorruptShardError:
            self._forget(shard)
            raise
        except OSError as exc:
            raise self._unreadable(shard, exc) from exc

    def slices(self, positions: NDArray[np.int64], shards: NDArray[np.int64]) -> list[Callable[[], None]]:
        """What reads rows, in pieces that threads can share. Rows that are missing are noted.

        positions: (m,) in the batch, in the order of reading. shards: (m,) of the rows at these positions.
        """
        of_row, numbers = shards.tolist(), [self._numbers[position] for position in positions.tolist()]
        offsets: list[int] = []
        descriptors: list[int] = []
        shard, descriptor, index = -1, -1, _NOTHING
        self._files: list[OpenFile] = []  # open for as long as they are read
        for wanted, number in zip(of_row, numbers, strict=True):
            if wanted != shard:
                shard, known = wanted, self.look_up(wanted)
                index = _NOTHING
                if known is not None:
                    self._files.append(known[0])
                    descriptor, index = known[0].descriptor, known[1].offsets
            offsets.append(index[number] if index else ABSENT_CHUNK)
            descriptors.append(descriptor)
        places = (np.array(descriptors, np.int32), np.array(offsets, np.int64), positions)
        if len(offsets) and min(offsets) < 0:
            there = self._there(places[1], of_row, numbers)
            self.missing.extend(positions[~there].tolist())
            places = tuple(place[there] for place in places)
            of_row, numbers = shards[there].tolist(), [numbers[at] for at in np.flatnonzero(there)]
        self._of_row, self._number_of_row = of_row, numbers
        check = np.full(len(of_row), self._verify != "never", np.uint8)
        if self._verify == "first":
            check[:] = [not checked[number] for checked, number in self._checked(0, len(of_row))]
        each = max(1, _SLICE_BYTES // self._layout.row_bytes)
        return [
            partial(self._read_slice, first, *(list_[first : first + each] for list_ in (*places, check)))
            for first in range(0, len(of_row), each)
        ]

    def _there(self, offsets: Ints, of_row: list[int], numbers: list[int]) -> NDArray[np.bool_]:
        """Which rows are there. Raises CorruptShardError for one that cannot be."""
        for at in np.flatnonzero(offsets < 0).tolist():
            self._forget(of_row[at])
            if offsets[at] != ABSENT_CHUNK:
                raise self._outside(of_row[at], numbers[at])
        return offsets >= 0

    def _checked(self, first: int, count: int) -> Iterator[tuple[bytearray, int]]:
        """For each of some rows its shard's list of rows that were checked, and its place in that."""
        for at in range(first, first + count):
            shard = self._known.shard((self._view, self._of_row[at]))
            if shard is not None:  # it may be forgotten by now, because of another row
                yield shard.checked, self._number_of_row[at]
            else:
                yield bytearray(self._shard_images), 0

    def _read_slice(self, first: int, descriptors: Ints, offsets: Ints, positions: Ints, check: Ints) -> None:
        failed = compiled.read(descriptors, offsets, positions, check, self._memory, self._layout.row_bytes)
        if failed is not None:
            self._raise(first + failed[0], failed[1], failed[2])
        if self._verify == "first":
            for checked, number in self._checked(first, len(check)):
                checked[number] = 1

    def _raise(self, at: int, status: int, error: int) -> NoReturn:
        shard, number = self._of_row[at], self._number_of_row[at]
        if status in (compiled.CUT_SHORT, compiled.OTHER_BYTES):
            self._forget(shard)
            raise (self._cut_short if status == compiled.CUT_SHORT else self._not_matching)(shard, number)
        cause = OSError(error, os.strerror(error))
        raise self._unreadable(shard, cause) from cause
