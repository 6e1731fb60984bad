"""One batch of rows: how its bytes are had from files or objects, checked and decoded."""

import errno
import os
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import google_crc32c
import numpy as np
import zstandard
from numpy.typing import NDArray

from radio_cache.errors import CorruptShardError, StorageError
from radio_cache.format.checksums import CRC_BYTES
from radio_cache.shards.encoding import ABSENT, LABEL_BYTES, decode_index, index_bytes, is_mislabelled
from radio_cache.shards.index_cache import ABSENT_CHUNK, OUTSIDE, OpenFile, ShardIndex, ShardIndexCache, ShardLayout
from radio_cache.storage.base import Storage

Verify = Literal["always", "first", "never"]
"""Which checksums to compare: of every chunk read, of every chunk's first reading by this process, or none."""

Bytes = NDArray[np.uint8]

PIECE = 256 << 10
"""Bytes read before they are checked, while the processor's cache still holds them; small rows are read several at once."""

_NO_WAIT: int | None = getattr(os, "RWF_NOWAIT", None)
"""Flag of `preadv`: only what is in memory. Linux has it; not every file system does."""

CURE = "`radio-cache repair` drops its shard, and the build makes it again"


class Job:
    """Rows of one shard: their positions in the batch, in the order of their place."""

    __slots__ = ("positions", "shard")

    def __init__(self, shard: int, positions: list[int]) -> None:
        self.shard, self.positions = shard, positions


class Batch:
    """One call of `ShardReader.read`, shared by its threads. Subclasses read the bytes of a job."""

    def __init__(
        self,
        storage: Storage,
        folder: str,
        layout: ShardLayout,
        known: ShardIndexCache,
        view: int,
        numbers: NDArray[np.int64],
        out: Bytes,
        verify: Verify,
    ) -> None:
        """Prepare a batch. `numbers` (m,) are row numbers within their shards, and `out` (m * row_bytes,) is the buffer."""
        self._storage, self._folder, self._layout, self._known = storage, folder, layout, known
        self._view, self._numbers, self._out, self._verify = view, numbers.tolist(), out, verify
        self._memory = out.data  # slices of a memoryview cost less than slices of an array
        self._shard_images = self._layout.shard_images
        self._tail_bytes = LABEL_BYTES + index_bytes(self._shard_images)
        self.missing: list[int] = []

    def run(self, job: Job) -> None:
        """Read a job's rows into `out`, and note those that are missing."""
        known = len(self.missing)
        try:
            # After an error or a missing row the index is read again: a repair or a build may replace the file.
            self.do(job)
        except CorruptShardError:
            self._forget(job.shard)
            raise
        if len(self.missing) > known:
            self._forget(job.shard)

    def _forget(self, shard: int) -> None:
        self._known.forget((self._view, shard))

    def do(self, job: Job) -> None:
        raise NotImplementedError

    def left_to_wait_for(self, jobs: list[Job]) -> list[Job]:
        """Do what needs no waiting; returns the rest."""
        return jobs

    def _path(self, shard: int) -> str:
        return f"{self._folder}/{self._layout.key(self._view, shard)}"

    def _place(self, shard: int, number: int) -> str:
        return f"{self._storage.at(self._path(shard))}: row {shard * self._shard_images + number}"

    def _cut_short(self, shard: int, number: int) -> CorruptShardError:
        return CorruptShardError(f"{self._place(shard, number)} is cut short: {CURE}")

    def _outside(self, shard: int, number: int) -> CorruptShardError:
        return CorruptShardError(
            f"{self._place(shard, number)} is cut short, or its index places it outside the file: {CURE}"
        )

    def _not_matching(self, shard: int, number: int) -> CorruptShardError:
        return CorruptShardError(f"{self._place(shard, number)} does not match its checksum: {CURE}")

    def _decoded_index(self, shard: int, tail: bytes, size: int, identity: tuple[int, ...]) -> ShardIndex:
        """Return the index in a shard's last bytes, with chunks outside the file marked.

        `tail` holds the last `_tail_bytes` of the file, or the whole file if it is shorter.
        """
        layout, place = self._layout, self._storage.at(self._path(shard))
        length = index_bytes(self._shard_images)
        if size < length:
            raise CorruptShardError(f"{place}: {size} bytes are too few to hold this shard's index: {CURE}")
        if is_mislabelled(tail[:-length], self._path(shard)):
            raise CorruptShardError(f"{place} is another shard's file: {CURE}")
        try:
            index = decode_index(tail[-length:], place)
        except CorruptShardError as exc:
            raise CorruptShardError(f"{exc}: {CURE}") from exc
        absent = (index == ABSENT).all(axis=1)
        offsets, lengths = index[:, 0].astype(np.int64), index[:, 1].astype(np.int64)
        room = size - length
        # 2^63 and more come out negative, so that no sum of two of these overflows.
        inside = (offsets >= 0) & (lengths > CRC_BYTES) & (lengths <= layout.max_chunk_bytes)
        inside &= np.minimum(offsets, room) + np.minimum(lengths, layout.max_chunk_bytes) <= room
        if not layout.zstd:
            inside &= lengths == layout.max_chunk_bytes
        offsets[~inside] = OUTSIDE
        offsets[absent] = ABSENT_CHUNK
        stored_lengths = array("q", lengths.tobytes()) if layout.zstd else None
        return ShardIndex(array("q", offsets.tobytes()), stored_lengths, bytearray(self._shard_images), identity)

    def _present(self, job: Job, shard: ShardIndex) -> list[tuple[int, int, int]]:
        """Return (position, number, offset) of the job's stored rows and record the others as missing."""
        present: list[tuple[int, int, int]] = []
        for position in job.positions:
            number = self._numbers[position]
            offset = shard.offsets[number]
            if offset >= 0:
                present.append((position, number, offset))
            elif offset == ABSENT_CHUNK:
                self.missing.append(position)
            else:
                raise self._outside(job.shard, number)
        return present

    def _row(self, position: int) -> Bytes:
        size = self._layout.row_bytes
        return self._out[position * size : (position + 1) * size]

    def _must_check(self, shard: ShardIndex, number: int) -> bool:
        return self._verify == "always" or (self._verify == "first" and not shard.checked[number])

    def _compare(
        self, shard: ShardIndex, job: Job, number: int, crc: int, stored: bytes | bytearray | memoryview
    ) -> None:
        if crc != int.from_bytes(stored, "little"):
            raise self._not_matching(job.shard, number)
        shard.checked[number] = 1

    def _decode(self, chunk: Bytes, shard: ShardIndex, job: Job, position: int, number: int) -> None:
        """Decode a chunk with its checksum, already in memory, into its row of `out`."""
        body = chunk[:-CRC_BYTES]
        if self._must_check(shard, number):
            self._compare(shard, job, number, google_crc32c.value(body), chunk[-CRC_BYTES:].data)
        if self._layout.zstd:
            decompress(body, self._row(position), lambda: self._place(job.shard, number))
        else:
            self._row(position)[:] = body


class LocalBatch(Batch):
    """By descriptor and `preadv`, which fills the caller's buffer without another copy."""

    _flags = 0

    def left_to_wait_for(self, jobs: list[Job]) -> list[Job]:
        # Small rows in the page cache: a second thread loses more in turns at the interpreter lock than it gains.
        if _NO_WAIT is None or self._layout.zstd or self._layout.row_bytes > PIECE:
            return jobs
        self._flags, self._left = _NO_WAIT, list[Job]()
        for job in jobs:
            self.run(job)
        self._flags = 0
        return self._left

    def do(self, job: Job) -> None:
        try:
            file, shard = self._opened(job.shard)
            if self._flags:
                self._read_cached(job, file, shard)
            else:
                self._read(job, file, shard)
        except FileNotFoundError:
            self.missing.extend(job.positions)
        except OSError as exc:
            raise self._unreadable(job.shard, exc) from exc

    def _unreadable(self, shard: int, error: OSError) -> StorageError:
        place = self._storage.at(self._path(shard))
        return StorageError(f"cannot read {place}: {error.strerror}: check the disk and the file's permissions")

    def _opened(self, shard: int) -> tuple[OpenFile, ShardIndex]:
        key = (self._view, shard)
        opened = self._known.opened.get(key)
        if opened:
            if self._known.crowded:
                self._known.use([key])
            return opened
        file, index = OpenFile(str(self._storage.local_path(self._path(shard)))), self._known.shards.get(key)
        status = os.fstat(file.descriptor)
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        # Between two openings a repair may have put another file in this place.
        if index is None or index.identity != identity:
            length = self._tail_bytes
            tail = os.pread(file.descriptor, length, max(0, status.st_size - length))
            index = self._decoded_index(shard, tail, status.st_size, identity)
        return self._known.keep_opened(key, file, index)

    def _read(self, job: Job, file: OpenFile, shard: ShardIndex) -> None:
        if shard.lengths is not None:
            for position, number, offset in self._present(job, shard):
                chunk = scratch.buffer(self._layout.max_chunk_bytes)[: shard.lengths[number]]
                self._fill([chunk.data], file, offset, job, number)
                self._decode(chunk, shard, job, position, number)
        elif self._layout.row_bytes > PIECE:
            for position, number, offset in self._present(job, shard):
                self._read_large(job, file, shard, position, number, offset)
        else:
            self._read_small(job, file, shard)

    def _read_cached(self, job: Job, file: OpenFile, shard: ShardIndex) -> None:
        """Read the rows that the page cache holds completely. The attempts make the disk fetch the others."""
        left = [chunk[0] for chunk in self._present(job, shard) if not self._read_one(job, file, shard, chunk)]
        if left:
            self._left.append(Job(job.shard, left))

    def _read_large(self, job: Job, file: OpenFile, shard: ShardIndex, position: int, number: int, offset: int) -> None:
        row, checked = self._row(position), self._must_check(shard, number)
        if not checked:
            self._fill([row.data], file, offset, job, number)
            return
        crc, stored = 0, bytearray(CRC_BYTES)
        # Each piece is checked while the processor's cache still holds it.
        for first in range(0, len(row), PIECE):
            piece = row[first : first + PIECE]
            last = first + PIECE >= len(row)
            self._fill([piece.data, stored] if last else [piece.data], file, offset + first, job, number)
            crc = google_crc32c.extend(crc, piece)
        self._compare(shard, job, number, crc, stored)

    def _read_small(self, job: Job, file: OpenFile, shard: ShardIndex) -> None:
        """Rows that lie one after the other in one `preadv`."""
        length = self._layout.row_bytes + CRC_BYTES
        present = self._present(job, shard)
        for run in _runs(present, length) if len(present) > 1 else [present] * len(present):
            if len(run) == 1:  # the usual case of random rows
                self._read_one(job, file, shard, run[0])
                continue
            stored = bytearray(CRC_BYTES * len(run))
            crcs = [memoryview(stored)[at : at + CRC_BYTES] for at in range(0, len(stored), CRC_BYTES)]
            rows = [self._row(position) for position, _, _ in run]
            buffers = [buffer for row, crc in zip(rows, crcs, strict=True) for buffer in (row.data, crc)]
            self._fill(buffers, file, run[0][2], job, run[0][1])
            for row, crc, (_, number, _) in zip(rows, crcs, run, strict=True):
                if self._must_check(shard, number):
                    self._compare(shard, job, number, google_crc32c.value(row), crc)

    def _read_one(self, job: Job, file: OpenFile, shard: ShardIndex, chunk: tuple[int, int, int]) -> bool:
        """Read a row and return True, or return False if it would have to wait and waiting is not allowed."""
        position, number, offset = chunk
        size = self._layout.row_bytes
        row = self._memory[position * size : (position + 1) * size]
        stored = bytearray(CRC_BYTES)
        try:
            got = os.preadv(file.descriptor, (row, stored), offset, self._flags)
        except OSError as exc:
            if not self._flags or exc.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise
            return False
        if got != size + CRC_BYTES:
            if self._flags:
                return False
            self._fill((row, stored), file, offset, job, number)
        if self._must_check(shard, number):
            self._compare(shard, job, number, google_crc32c.value(self._row(position)), stored)
        return True

    def _fill(
        self, buffers: Sequence[bytearray | memoryview], file: OpenFile, offset: int, job: Job, number: int
    ) -> None:
        """Fill the buffers with the bytes from `offset` on."""
        needed = sum(map(len, buffers))
        got = os.preadv(file.descriptor, buffers, offset)
        if got == needed:
            return
        # Network file systems may return less than there is.
        for buffer in buffers:
            view = memoryview(buffer)
            skipped = min(len(view), got)
            got -= skipped
            offset += skipped
            view = view[skipped:]
            while len(view):
                count = os.preadv(file.descriptor, [view], offset)
                if count == 0:
                    raise self._cut_short(job.shard, number)
                offset, view = offset + count, view[count:]


class RemoteBatch(Batch):
    """By ranges of an object: all rows of a shard in one request to the storage, which joins what lies close together."""

    def do(self, job: Job) -> None:
        try:
            shard = self._known.shard((self._view, job.shard)) or self._index(job.shard)
            present = self._present(job, shard)
            longest = self._layout.max_chunk_bytes
            lengths = [longest if shard.lengths is None else shard.lengths[number] for _, number, _ in present]
            ranges = [(offset, length) for (_, _, offset), length in zip(present, lengths, strict=True)]
            chunks = self._storage.read_ranges(self._path(job.shard), ranges) if ranges else []
        except FileNotFoundError:
            self.missing.extend(job.positions)
            return
        for (position, number, _), length, chunk in zip(present, lengths, chunks, strict=True):
            if len(chunk) != length:
                raise self._cut_short(job.shard, number)
            self._decode(np.frombuffer(chunk, dtype=np.uint8), shard, job, position, number)

    def _index(self, shard: int) -> ShardIndex:
        tail, size = self._storage.read_tail(self._path(shard), self._tail_bytes)
        return self._known.keep_shard((self._view, shard), self._decoded_index(shard, tail, size, (size,)))


def _runs(present: list[tuple[int, int, int]], length: int) -> Iterator[list[tuple[int, int, int]]]:
    """Yield runs of chunks of `length` bytes that follow each other in the file, of at most PIECE bytes together."""
    most_chunks = max(1, PIECE // length)
    run: list[tuple[int, int, int]] = []
    for chunk in present:
        if run and (chunk[2] != run[-1][2] + length or len(run) == most_chunks):
            yield run
            run = []
        run.append(chunk)
    if run:
        yield run


class _Scratch(threading.local):
    """Buffers of a thread for decompression, reused because new memory costs more than reading."""

    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor()
        self._buffer = np.empty(0, np.uint8)

    def buffer(self, num_bytes: int) -> Bytes:
        if len(self._buffer) < num_bytes:
            self._buffer = np.empty(num_bytes, np.uint8)
        return self._buffer


scratch = _Scratch()


def decompress(frame: Bytes, out: Bytes, place: Callable[[], str]) -> None:
    """Decompress a zstd frame into `out`, which it must fill exactly. The frame's own size is never used to allocate memory."""
    try:
        # The frame's own size only counts if it is that of a row. Then zstd decodes straight into `out`.
        if zstandard.frame_content_size(frame.data) == len(out):
            reader = scratch.decompressor.stream_reader(frame.data, read_across_frames=True)
            # One more byte would be a frame longer than a row.
            if reader.readinto(out) == len(out) and not reader.read(1):
                return
    except zstandard.ZstdError as exc:
        raise CorruptShardError(f"{place()} is not a zstd frame ({exc}): {CURE}") from exc
    raise CorruptShardError(f"{place()} does not hold the {len(out)} bytes of a row: {CURE}")
