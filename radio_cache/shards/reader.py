"""Reads of many rows of one sharded array into the caller's buffer, the hot path of training.

A batch is sorted by position and split into jobs of one shard each, which the requested number of threads share.
A shard's index is read once and cached. On a local disk a job is one or a few `preadv`, on an object store one
`Storage.read_ranges`. No lock is held while bytes are read, verified or decoded.
"""

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import final

import numpy as np
from numpy.typing import NDArray

from radio_cache.shards import native as native_batch
from radio_cache.shards.batch import PIECE, Batch, Bytes, Job, LocalBatch, RemoteBatch, Verify
from radio_cache.shards.index_cache import ShardIndexCache, ShardLayout
from radio_cache.shards.native import NativeBatch
from radio_cache.storage.base import Storage

_REMOTE_THREADS = 16
"""Requests to an object store at a time, at least: they wait, they do not compute."""


@final
class ShardReader:
    """Reads one array. Safe to share between threads and to pickle; after a fork the child starts with nothing open."""

    def __init__(self, storage: Storage, folder: str, layout: ShardLayout) -> None:
        """Open the array in `folder`, a path below the storage's root."""
        self._storage, self._folder, self._layout = storage, folder, layout
        self._known = ShardIndexCache()

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
        if os.getpid() != self._known.process:
            self._known = ShardIndexCache()  # the parent's locks may be held by threads that a child lacks
        shards, numbers = np.divmod(rows, self._layout.shard_images)
        # In the order of the file, which a disk and a bucket read faster than random order.
        order = np.argsort(rows, kind="stable")
        place = (self._storage, self._folder, self._layout, self._known, view, numbers, out.reshape(-1), verify)
        if not self._storage.is_local:
            batch: Batch = RemoteBatch(*place)
            # A request is mostly waiting, so more threads than cores pay.
            threads = max(threads, _REMOTE_THREADS)
            steps = _steps(batch, _jobs(shards, order))
        elif native_batch.AVAILABLE:
            batch = NativeBatch(*place)
            if threads > 1:
                # Indices that are not cached yet are read in parallel, before the rows.
                _run([partial(batch.look_up, shard) for shard in batch.unknown(shards)], threads)
            steps = batch.steps(order, shards[order], threads)
        else:
            batch, jobs = LocalBatch(*place), _jobs(shards, order)
            if threads > 1:
                jobs = _shared(batch.left_to_wait_for(jobs), max(1, PIECE // self._layout.row_bytes))
            steps = _steps(batch, jobs)
        _run(steps, threads)
        if not batch.missing:
            return _NONE
        return np.sort(np.array(batch.missing, dtype=np.int64))


_NONE = np.empty(0, np.int64)


def _steps(batch: Batch, jobs: Sequence[Job]) -> list[Callable[[], None]]:
    return [partial(batch.run, job) for job in jobs]


def _jobs(shards: NDArray[np.int64], order: NDArray[np.int64]) -> list[Job]:
    """Return one job for each shard."""
    jobs: list[Job] = []
    sorted_shards = shards[order]
    # Last position of every run of equal shards.
    ends = np.flatnonzero(np.diff(sorted_shards, append=-1)) + 1
    places, first = order.tolist(), 0
    for shard, end in zip(sorted_shards[ends - 1].tolist(), ends.tolist(), strict=True):
        jobs.append(Job(shard, places[first:end]))
        first = end
    return jobs


def _shared(jobs: Sequence[Job], most_rows: int) -> list[Job]:
    """Split jobs into jobs of at most `most_rows` rows, so that threads share a batch evenly."""
    return [
        Job(job.shard, job.positions[first : first + most_rows])
        for job in jobs
        for first in range(0, len(job.positions), most_rows)
    ]


def _run(steps: Sequence[Callable[[], object]], threads: int) -> None:
    """Do all steps, in this thread and `threads - 1` others. The first error stops the rest and is raised."""
    if len(steps) <= 1 or threads == 1:
        for step in steps:
            step()
        return
    # An iterator shared by threads: `next` on it is atomic under the interpreter's lock.
    waiting = iter(steps)

    def work() -> None:
        for step in waiting:
            step()

    def help_out() -> None:
        try:
            work()
        finally:
            deque(waiting, maxlen=0)  # after an error the remaining steps are dropped

    helpers: list[Future[None]] = [_pool().submit(help_out) for _ in range(min(threads, len(steps)) - 1)]
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
    """Return this process's helper threads. Threads do not survive a fork, so a child has its own."""
    process = os.getpid()
    return _pools.get(process) or _pools.setdefault(
        process, ThreadPoolExecutor(_MAX_HELPERS, thread_name_prefix="radio-cache-read")
    )
