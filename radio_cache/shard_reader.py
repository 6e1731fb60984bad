"""Rows of one sharded array, many at a time, straight into the caller's buffer: the hot path of reading.

A batch is sorted by place, cut into jobs of one shard each, and the jobs are taken by as many threads as were asked
for. A shard's index is read once and kept. On a local disk a job is a `preadv` or a few; on an object store it is one
`Storage.read_ranges`. No lock is held while bytes are read, checked or decoded.
"""

import errno
import os
import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar, final

import google_crc32c
import numpy as np
import zstandard
from numpy.typing import NDArray

from radio_cache.errors import CorruptShardError, StorageError
from radio_cache.shards import ABSENT, CRC_BYTES, LABEL_BYTES, decode_index, index_bytes, is_mislabelled
from radio_cache.storage import Storage

Verify = Literal["always", "first", "never"]
"""Which checksums to compare: of every chunk read, of every chunk's first reading by this process, or none."""

Bytes = NDArray[np.uint8]
Thing = TypeVar("Thing")

MAX_OPEN_FILES = 256
"""Descriptors one array keeps open, of a process's 1,024 or so."""

MAX_KEPT_SHARDS = 1 << 15
"""Indexes kept of one array: of shards of 128 images at most 64 MB."""

_PIECE = 256 << 10
"""Bytes read before they are checked, while the processor's cache still holds them; small rows are read several at once."""

_REMOTE_THREADS = 16
"""Requests to an object store at a time, at least: they wait, they do not compute."""

_NO_WAIT: int | None = getattr(os, "RWF_NOWAIT", None)
"""Flag of `preadv`: only what is in memory. Linux has it; not every file system does."""

_ABSENT, _OUTSIDE = -1, -2
"""In place of an offset: the chunk is not there; the index places it where it cannot be."""

_CURE = "`radio-cache repair` drops its shard, and the build makes it again"


@dataclass(frozen=True, kw_only=True)
class ShardLayout:
    """What is the same for all shards of an array of shape (views, n, *row), whose inner chunk is one row of one view.

    row_axes: how many axes a row has. row_bytes: its size, decoded. zstd: whether chunks are compressed.
    """

    row_axes: int
    row_bytes: int
    shard_images: int
    zstd: bool

    @property
    def max_chunk_bytes(self) -> int:
        """The longest chunk there can be, with its checksum. What zstd cannot compress grows a little."""
        return self.row_bytes + ((self.row_bytes >> 7) + 64 if self.zstd else 0) + CRC_BYTES

    def key(self, view: int, shard: int) -> str:
        """Path of a shard file below the array."""
        return f"c/{view}/{shard}" + "/0" * self.row_axes


@final
class ShardReader:
    """Reads one array. Safe to share between threads and to pickle; after a fork the child starts with nothing open."""

    def __init__(self, storage: Storage, folder: str, layout: ShardLayout) -> None:
        """folder: of the array, below the storage's root."""
        self._storage, self._folder, self._layout = storage, folder, layout
        self._kept = _Kept()

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[Storage, str, ShardLayout]]:
        return (ShardReader, (self._storage, self._folder, self._layout))

    def key(self, view: int, row: int) -> str:
        """Path below the array of the shard file that holds a row."""
        return self._layout.key(view, row // self._layout.shard_images)

    def read(
        self, view: int, rows: NDArray[np.int64], out: Bytes, *, verify: Verify = "always", threads: int = 1
    ) -> NDArray[np.int64]:
        """Fill out[i] with the decoded bytes of rows[i]; returns the positions i whose chunks are not there, sorted.

        rows: (m,) at least 0; any order, repeats allowed. out: (m, row_bytes), C-contiguous.
        Raises CorruptShardError naming the file, the row and the cure; StorageError where the file cannot be read.
        """
        if os.getpid() != self._kept.process:
            self._kept = _Kept()  # the parent's locks may be held by threads that are not here
        flat = out.reshape(-1)
        shards, numbers = np.divmod(rows, self._layout.shard_images)
        order = np.argsort(rows, kind="stable")
        jobs = _jobs(shards, order)
        if self._storage.is_local:
            batch: _Batch = _LocalBatch(self, view, shards, numbers, flat, verify)
            if threads > 1:
                jobs = _shared(batch.left_to_wait_for(jobs), max(1, _PIECE // self._layout.row_bytes))
        else:
            batch = _RemoteBatch(self, view, shards, numbers, flat, verify)
            threads = max(threads, _REMOTE_THREADS)
        _run(batch, jobs, threads)
        return np.sort(np.array(batch.missing, dtype=np.int64))


class _File:
    """An open descriptor, closed when nobody uses it any more: eviction cannot close it under a reading thread."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


@dataclass(slots=True)
class _Shard:
    """A shard's index: where each chunk begins (or _ABSENT, _OUTSIDE), its length with checksum, and who was checked.

    identity: of the file the index is of; lengths: None where all are row_bytes + CRC_BYTES.
    """

    offsets: "array[int]"  # not NumPy's: whose elements cost five times as much to look at
    lengths: "array[int] | None"
    checked: bytearray
    identity: tuple[int, ...]


class _Kept:
    """What a process keeps of an array: indexes, and descriptors, least recently used first."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.lock = threading.Lock()
        self.shards: OrderedDict[tuple[int, int], _Shard] = OrderedDict()
        self.files: OrderedDict[tuple[int, int], _File] = OrderedDict()

    def shard(self, key: tuple[int, int]) -> _Shard | None:
        return self._used(self.shards, key, MAX_KEPT_SHARDS)

    def file(self, key: tuple[int, int]) -> _File | None:
        return self._used(self.files, key, MAX_OPEN_FILES)

    def _used(self, kept: OrderedDict[tuple[int, int], Thing], key: tuple[int, int], most: int) -> Thing | None:
        found = kept.get(key)
        if found is not None and 2 * len(kept) > most:  # with room to spare, who was used last does not matter
            with self.lock:
                if key in kept:
                    kept.move_to_end(key)
        return found

    def forget(self, key: tuple[int, int]) -> None:
        """Look at the file anew next time: it may be repaired, or finished, by then."""
        with self.lock:
            self.shards.pop(key, None)
            file = self.files.pop(key, None)
        del file  # closed here, outside the lock

    def keep_shard(self, key: tuple[int, int], shard: _Shard) -> _Shard:
        with self.lock:
            self.shards[key] = shard
            if len(self.shards) > MAX_KEPT_SHARDS:
                self.shards.popitem(last=False)
        return shard

    def keep_file(self, key: tuple[int, int], file: _File) -> _File:
        with self.lock:
            self.files[key] = file
            evicted = self.files.popitem(last=False) if len(self.files) > MAX_OPEN_FILES else None
        del evicted  # closes it, outside the lock, unless somebody reads from it
        return file


class _Job:
    """Rows of one shard: their positions in the batch, in the order of their place."""

    __slots__ = ("positions", "shard")

    def __init__(self, shard: int, positions: list[int]) -> None:
        self.shard, self.positions = shard, positions


def _jobs(shards: NDArray[np.int64], order: NDArray[np.int64]) -> list[_Job]:
    """One for each shard."""
    jobs: list[_Job] = []
    sorted_shards = shards[order]
    ends = np.flatnonzero(np.diff(sorted_shards, append=-1)) + 1
    places, first = order.tolist(), 0
    for shard, end in zip(sorted_shards[ends - 1].tolist(), ends.tolist(), strict=True):
        jobs.append(_Job(shard, places[first:end]))
        first = end
    return jobs


def _shared(jobs: Sequence[_Job], most: int) -> list[_Job]:
    """Jobs of at most `most` rows, so that threads can share a batch evenly."""
    return [
        _Job(job.shard, job.positions[first : first + most]) for job in jobs for first in range(0, len(job.positions), most)
    ]


class _Batch:
    """One call of `ShardReader.read`, shared by its threads. Subclasses say how a job's bytes are had."""

    def __init__(
        self, reader: ShardReader, view: int, shards: NDArray[np.int64], numbers: NDArray[np.int64], out: Bytes,
        verify: Verify,
    ) -> None:  # fmt: skip
        self._storage, self._folder, self._layout = reader._storage, reader._folder, reader._layout  # pyright: ignore[reportPrivateUsage]
        self._kept = reader._kept  # pyright: ignore[reportPrivateUsage]
        self._view, self._numbers, self._out, self._verify = view, numbers.tolist(), out, verify
        self._memory = out.data  # cut faster than the array
        self._shard_images = self._layout.shard_images
        self._tail_bytes = LABEL_BYTES + index_bytes(self._shard_images)
        self.missing: list[int] = []

    def run(self, job: _Job) -> None:
        """Read a job's rows into `out`, and note those that are missing."""
        known = len(self.missing)
        try:
            self.do(job)
        except CorruptShardError:
            self._kept.forget((self._view, job.shard))
            raise
        if len(self.missing) > known:
            self._kept.forget((self._view, job.shard))

    def do(self, job: _Job) -> None:
        raise NotImplementedError

    def left_to_wait_for(self, jobs: list[_Job]) -> list[_Job]:
        """Do what needs no waiting; returns the rest."""
        return jobs

    def _path(self, shard: int) -> str:
        return f"{self._folder}/{self._layout.key(self._view, shard)}"

    def _place(self, shard: int, number: int) -> str:
        return f"{self._storage.at(self._path(shard))}: row {shard * self._shard_images + number}"

    def _decoded_index(self, shard: int, tail: bytes, size: int, identity: tuple[int, ...]) -> _Shard:
        """The index from a shard's last bytes, with places outside the file marked. tail: of `_tail_bytes`, or all there is."""
        layout, place = self._layout, self._storage.at(self._path(shard))
        length = index_bytes(self._shard_images)
        if size < length:
            raise CorruptShardError(f"{place}: {size} bytes are too few to hold this shard's index: {_CURE}")
        if is_mislabelled(tail[:-length], self._path(shard)):
            raise CorruptShardError(f"{place} is another shard's file: {_CURE}")
        try:
            index = decode_index(tail[-length:], place)
        except CorruptShardError as exc:
            raise CorruptShardError(f"{exc}: {_CURE}") from exc
        absent = (index == ABSENT).all(axis=1)
        offsets, lengths = index[:, 0].astype(np.int64), index[:, 1].astype(np.int64)
        room = size - length
        # 2^63 and more come out negative, so that no sum of two of these overflows.
        inside = (offsets >= 0) & (lengths > CRC_BYTES) & (lengths <= layout.max_chunk_bytes)
        inside &= np.minimum(offsets, room) + np.minimum(lengths, layout.max_chunk_bytes) <= room
        if not layout.zstd:
            inside &= lengths == layout.max_chunk_bytes
        offsets[~inside] = _OUTSIDE
        offsets[absent] = _ABSENT
        kept = array("q", lengths.tobytes()) if layout.zstd else None
        return _Shard(array("q", offsets.tobytes()), kept, bytearray(self._shard_images), identity)

    def _present(self, job: _Job, shard: _Shard) -> list[tuple[int, int, int]]:
        """(position, number, offset) of the job's rows that are there; the others are noted as missing."""
        found: list[tuple[int, int, int]] = []
        for position in job.positions:
            number = self._numbers[position]
            offset = shard.offsets[number]
            if offset >= 0:
                found.append((position, number, offset))
            elif offset == _ABSENT:
                self.missing.append(position)
            else:
                raise CorruptShardError(
                    f"{self._place(job.shard, number)} is cut short, or its index places it outside the file: {_CURE}"
                )
        return found

    def _row(self, position: int) -> Bytes:
        size = self._layout.row_bytes
        return self._out[position * size : (position + 1) * size]

    def _must_check(self, shard: _Shard, number: int) -> bool:
        return self._verify == "always" or (self._verify == "first" and not shard.checked[number])

    def _compare(self, shard: _Shard, job: _Job, number: int, crc: int, stored: bytes | bytearray | memoryview) -> None:
        if crc != int.from_bytes(stored, "little"):
            raise CorruptShardError(f"{self._place(job.shard, number)} does not match its checksum: {_CURE}")
        shard.checked[number] = 1

    def _decode(self, chunk: Bytes, shard: _Shard, job: _Job, position: int, number: int) -> None:
        """A stored chunk with its checksum, already in memory, into its row of `out`."""
        body = chunk[:-CRC_BYTES]
        if self._must_check(shard, number):
            self._compare(shard, job, number, google_crc32c.value(body), chunk[-CRC_BYTES:].data)
        if self._layout.zstd:
            _decompress(body, self._row(position), lambda: self._place(job.shard, number))
        else:
            self._row(position)[:] = body


class _LocalBatch(_Batch):
    """By descriptor and `preadv`, which fills the caller's buffer without another copy."""

    _flags = 0

    def left_to_wait_for(self, jobs: list[_Job]) -> list[_Job]:
        # Small rows in the page cache: two threads cost more in taking turns at the interpreter than they gain.
        if _NO_WAIT is None or self._layout.zstd or self._layout.row_bytes > _PIECE:
            return jobs
        self._flags, self._left = _NO_WAIT, list[_Job]()
        for job in jobs:
            self.run(job)
        self._flags = 0
        return self._left

    def do(self, job: _Job) -> None:
        try:
            file, shard = self._opened(job.shard)
            if self._flags:
                self._read_cached(job, file, shard)
            else:
                self._read(job, file, shard)
        except FileNotFoundError:
            self.missing.extend(job.positions)
        except OSError as exc:
            place = self._storage.at(self._path(job.shard))
            raise StorageError(
                f"cannot read {place}: {exc.strerror}: check the disk and the file's permissions"
            ) from exc

    def _opened(self, shard: int) -> tuple[_File, _Shard]:
        key = (self._view, shard)
        file, index = self._kept.file(key), self._kept.shard(key)
        if file and index:
            return file, index
        file = file or _File(str(self._storage.local_path(self._path(shard))))
        status = os.fstat(file.descriptor)
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        # Between two openings a repair may have put another file in this place.
        if index is None or index.identity != identity:
            length = self._tail_bytes
            tail = os.pread(file.descriptor, length, max(0, status.st_size - length))
            index = self._decoded_index(shard, tail, status.st_size, identity)
        return self._kept.keep_file(key, file), self._kept.keep_shard(key, index)

    def _read(self, job: _Job, file: _File, shard: _Shard) -> None:
        if shard.lengths is not None:
            for position, number, offset in self._present(job, shard):
                chunk = _scratch.buffer(self._layout.max_chunk_bytes)[: shard.lengths[number]]
                self._fill([chunk.data], file, offset, job, number)
                self._decode(chunk, shard, job, position, number)
        elif self._layout.row_bytes > _PIECE:
            for position, number, offset in self._present(job, shard):
                self._read_large(job, file, shard, position, number, offset)
        else:
            self._read_small(job, file, shard)

    def _read_cached(self, job: _Job, file: _File, shard: _Shard) -> None:
        """The rows that the page cache holds whole. Asking for the others has told the disk to fetch them."""
        left = [chunk[0] for chunk in self._present(job, shard) if not self._read_one(job, file, shard, chunk)]
        if left:
            self._left.append(_Job(job.shard, left))

    def _read_large(self, job: _Job, file: _File, shard: _Shard, position: int, number: int, offset: int) -> None:
        row, checked = self._row(position), self._must_check(shard, number)
        if not checked:
            self._fill([row.data], file, offset, job, number)
            return
        crc, stored = 0, bytearray(CRC_BYTES)
        for first in range(0, len(row), _PIECE):
            piece = row[first : first + _PIECE]
            last = first + _PIECE >= len(row)
            self._fill([piece.data, stored] if last else [piece.data], file, offset + first, job, number)
            crc = google_crc32c.extend(crc, piece)
        self._compare(shard, job, number, crc, stored)

    def _read_small(self, job: _Job, file: _File, shard: _Shard) -> None:
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

    def _read_one(self, job: _Job, file: _File, shard: _Shard, chunk: tuple[int, int, int]) -> bool:
        """Returns whether the row could be had; False only where waiting is not allowed."""
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
        self, buffers: Sequence[bytearray | memoryview], file: _File, offset: int, job: _Job, number: int
    ) -> None:
        """Fill the buffers with the bytes from `offset` on."""
        wanted = sum(map(len, buffers))
        got = os.preadv(file.descriptor, buffers, offset)
        if got == wanted:
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
                    raise CorruptShardError(f"{self._place(job.shard, number)} is cut short: {_CURE}")
                offset, view = offset + count, view[count:]


class _RemoteBatch(_Batch):
    """By ranges of an object: all rows of a shard in one request to the storage, which joins what lies close together."""

    def do(self, job: _Job) -> None:
        try:
            shard = self._kept.shard((self._view, job.shard)) or self._index(job.shard)
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
                raise CorruptShardError(f"{self._place(job.shard, number)} is cut short: {_CURE}")
            self._decode(np.frombuffer(chunk, dtype=np.uint8), shard, job, position, number)

    def _index(self, shard: int) -> _Shard:
        tail, size = self._storage.read_tail(self._path(shard), self._tail_bytes)
        return self._kept.keep_shard((self._view, shard), self._decoded_index(shard, tail, size, (size,)))


def _runs(present: list[tuple[int, int, int]], length: int) -> Iterator[list[tuple[int, int, int]]]:
    """Chunks of `length` bytes that follow each other in the file, at most _PIECE bytes together."""
    most = max(1, _PIECE // length)
    run: list[tuple[int, int, int]] = []
    for chunk in present:
        if run and (chunk[2] != run[-1][2] + length or len(run) == most):
            yield run
            run = []
        run.append(chunk)
    if run:
        yield run


class _Scratch(threading.local):
    """What a thread needs to decompress: reused, because fresh memory costs more than reading does."""

    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor()
        self._buffer = np.empty(0, np.uint8)

    def buffer(self, num_bytes: int) -> Bytes:
        if len(self._buffer) < num_bytes:
            self._buffer = np.empty(num_bytes, np.uint8)
        return self._buffer


_scratch = _Scratch()


def _decompress(frame: Bytes, out: Bytes, place: Callable[[], str]) -> None:
    """A zstd frame into `out`, which it must fill exactly. Nothing is allocated from what the frame says."""
    try:
        # Believed only if it is what the array's shape says; then the library decodes straight into `out`.
        if zstandard.frame_content_size(frame.data) == len(out):
            reader = _scratch.decompressor.stream_reader(frame.data, read_across_frames=True)
            if reader.readinto(out) == len(out) and not reader.read(1):
                return
    except zstandard.ZstdError as exc:
        raise CorruptShardError(f"{place()} is not a zstd frame ({exc}): {_CURE}") from exc
    raise CorruptShardError(f"{place()} does not hold the {len(out)} bytes of a row: {_CURE}")


def _run(batch: _Batch, jobs: Sequence[_Job], threads: int) -> None:
    """Do all jobs, in this thread and `threads - 1` others. The first error stops the rest and is raised."""
    waiting = iter(jobs)

    def work() -> None:
        for job in waiting:
            batch.run(job)

    def help_out() -> None:
        try:
            work()
        finally:
            deque(waiting, maxlen=0)  # after an error, nobody takes another job

    helpers: list[Future[None]] = [_pool().submit(help_out) for _ in range(min(threads, len(jobs)) - 1)]
    try:
        help_out()
    finally:
        # Helpers that have not begun are not needed any more; the others may still write into the caller's buffer.
        errors = [helper.exception() for helper in helpers if not helper.cancel()]
    for error in errors:
        if error:
            raise error


_pools: dict[int, ThreadPoolExecutor] = {}
_MAX_HELPERS = 64


def _pool() -> ThreadPoolExecutor:
    """This process's helpers. Threads do not survive a fork, so that a child has its own."""
    process = os.getpid()
    return _pools.get(process) or _pools.setdefault(
        process, ThreadPoolExecutor(_MAX_HELPERS, thread_name_prefix="radio-cache-read")
    )
