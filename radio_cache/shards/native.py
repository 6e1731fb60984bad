"""Chunks of files by compiled code: one call of it reads and checks many of them while Python does other things.

`radio_cache.native._rows` is built where there is a C compiler and an x86-64 processor. Without it `LocalBatch` does the same in
Python, which is half as fast with two threads: they take turns at the interpreter for every row.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import CorruptShardError
from radio_cache.format.checksums import CRC_BYTES
from radio_cache.native import rows as compiled
from radio_cache.shards.batch import LocalBatch, decompress, scratch
from radio_cache.shards.index_cache import ABSENT_CHUNK, OpenFile, ShardIndex

AVAILABLE: bool = compiled is not None
"""Whether compiled code reads rows."""

Ints = NDArray[np.integer[Any]]

_SLICE_BYTES = 512 << 10
"""Of zstd frames that a thread reads before it decodes them: they stay in the processor's cache meanwhile."""


class NativeBatch(LocalBatch):
    """First all rows are looked up, then they are read, whatever shards they are of.

    Uncompressed rows go straight into the caller's buffer, in one call that has threads of its own. zstd frames are
    decoded by its library, a slice of them at a time, in Python's threads.
    """

    def unknown(self, shards: NDArray[np.int64]) -> list[int]:
        """Return the shards that cannot be looked up without a read."""
        opened, view = self._known.opened, self._view
        return [shard for shard in dict.fromkeys(shards.tolist()) if (view, shard) not in opened]

    def look_up(self, shard: int) -> tuple[OpenFile, ShardIndex] | None:
        """Return a shard's file and index; None without such a file."""
        try:
            return self._opened(shard)
        except FileNotFoundError:
            return None
        except CorruptShardError:
            self._forget(shard)
            raise
        except OSError as exc:
            raise self._unreadable(shard, exc) from exc

    def steps(self, positions: NDArray[np.int64], shards: NDArray[np.int64], threads: int) -> list[Callable[[], None]]:
        """Return functions that read the rows, in pieces for several threads. Missing rows are recorded.

        Args:
            positions: (m,) in the batch, in the order of reading.
            shards: (m,) of the rows at these positions.
            threads: that one piece may use for itself.
        """
        self._find(positions, shards)
        row_bytes, count = self._layout.row_bytes, len(self._of_row)
        if not self._layout.zstd:
            # Uncompressed rows have one length and go straight into the caller's buffer.
            self._lengths = np.full(count, row_bytes, np.int64)
            return [partial(self._fetch, slice(0, count), self._positions * row_bytes, self._memory, threads)]
        opened = zip(self._opened_rows, self._number_of_row, strict=True)
        stored = [index.lengths[number] for (_, index), number in opened if index.lengths]
        # Stored lengths include the checksum, which the compiled code reads by itself.
        self._lengths = np.array(stored, np.int64) - CRC_BYTES
        ends = np.cumsum(self._lengths)
        # Slices of about equal bytes, so that threads finish together.
        cuts = np.flatnonzero(np.diff(ends // _SLICE_BYTES, prepend=0)).tolist()
        return [
            partial(self._read_and_decode, slice(first, last))
            for first, last in zip([0, *cuts], [*cuts, count], strict=True)
            if last > first
        ]

    def _find(self, positions: NDArray[np.int64], shards: NDArray[np.int64]) -> None:
        """Store file, offset, shard, row number, batch position and verification flag of every row that exists."""
        known, view = self._known, self._view
        of_row, numbers = shards.tolist(), [self._numbers[position] for position in positions.tolist()]
        rows: list[tuple[OpenFile, ShardIndex] | None] = []
        last, opened = -1, None
        for shard in of_row:
            # Rows are sorted, so a shard is looked up once.
            if shard != last:
                last, opened = shard, known.opened.get((view, shard)) or self.look_up(shard)
            rows.append(opened)
        if known.crowded:
            known.use((view, shard) for shard in dict.fromkeys(of_row))
        offsets = [row[1].offsets[number] if row else ABSENT_CHUNK for row, number in zip(rows, numbers, strict=True)]
        # Negative offsets mark missing chunks and chunks outside the file.
        if offsets and min(offsets) < 0:
            present = self._there(offsets, of_row, numbers)
            self.missing.extend(np.delete(positions, present).tolist())
            positions = positions[present]
            of_row, numbers, offsets = ([every[at] for at in present] for every in (of_row, numbers, offsets))
            rows = [rows[at] for at in present]
        self._opened_rows = [row for row in rows if row]  # keeps the files open for as long as they are read
        self._of_row, self._number_of_row, self._positions = of_row, numbers, positions
        self._descriptors = np.array([file.descriptor for file, _ in self._opened_rows], np.int32)
        self._offsets = np.array(offsets, np.int64)
        self._check = np.full(len(of_row), self._verify != "never", np.uint8)
        if self._verify == "first":
            pairs = zip(self._opened_rows, numbers, strict=True)
            self._check[:] = [not index.checked[number] for (_, index), number in pairs]

    def _there(self, offsets: list[int], of_row: list[int], numbers: list[int]) -> list[int]:
        """Return the indices of the rows that exist.

        Raises:
            CorruptShardError: for an impossible offset.
        """
        for offset, shard, number in zip(offsets, of_row, numbers, strict=True):
            if offset < 0:
                self._forget(shard)
                if offset != ABSENT_CHUNK:
                    raise self._outside(shard, number)
        return [at for at, offset in enumerate(offsets) if offset >= 0]

    def _fetch(self, part: slice, places: Ints, out: Any, threads: int) -> None:
        """Read and check some of the rows found. places: where each goes in `out`, bytes."""
        descriptors, offsets, lengths, check = (
            every[part] for every in (self._descriptors, self._offsets, self._lengths, self._check)
        )
        # One call without the interpreter's lock. It returns (row, status, errno) of the first failure.
        failed = compiled.read(descriptors, offsets, lengths, places, check, out, threads)
        if failed is not None:
            self._raise(part.start + failed[0], failed[1], failed[2])
        if self._verify == "first":
            for (_, index), number in zip(self._opened_rows[part], self._number_of_row[part], strict=True):
                index.checked[number] = 1

    def _read_and_decode(self, part: slice) -> None:
        lengths = self._lengths[part]
        ends = np.cumsum(lengths)
        # All frames of the slice in one buffer, then decoded one by one.
        frames = scratch.buffer(int(ends[-1]))
        self._fetch(part, ends - lengths, frames, 1)
        for at, end, length in zip(range(part.start, part.stop), ends.tolist(), lengths.tolist(), strict=True):
            shard, number = self._of_row[at], self._number_of_row[at]
            row = self._row(int(self._positions[at]))
            decompress(frames[end - length : end], row, partial(self._place, shard, number))

    def _raise(self, at: int, status: int, error: int) -> NoReturn:
        shard, number = self._of_row[at], self._number_of_row[at]
        if status in (compiled.CUT_SHORT, compiled.OTHER_BYTES):
            self._forget(shard)
            raise (self._cut_short if status == compiled.CUT_SHORT else self._not_matching)(shard, number)
        cause = OSError(error, os.strerror(error))
        raise self._unreadable(shard, cause) from cause
