"""One shard as a task for another process: small, picklable, and all that a worker needs to know.

A worker process keeps the cache, the teacher and its threads from one task to the next. It computes one shard at a time; what it
is given meanwhile stands in a line, so that the device goes from one to the next.
"""

import contextlib
import gc
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from cache_builder.build_config import BuildConfig
from cache_builder.build_output import check_same
from cache_builder.computed_with import with_recorded_batch
from cache_builder.pipeline.image_access import ImageAccess, Witness
from cache_builder.pipeline.passes import register_teacher
from cache_builder.pipeline.scan import scan_shard
from cache_builder.pipeline.shards import run_shards
from cache_builder.pipeline.timing import StageSeconds
from cache_builder.teachers import load_teacher
from cache_builder.teachers.base import Teacher
from cache_builder.workers.shard_queue import ShardQueue
from radio_cache import __version__
from radio_cache.errors import BlindWorkerError, ClusterError, RadioCacheError
from radio_cache.format.schema import IMAGES_UNIT, Receipt
from radio_cache.reader import Cache, is_cache
from radio_cache.receipts import is_finished, read_receipt
from radio_cache.storage.base import is_url

JOIN = -1
"""In place of a shard: choose the codec of the teacher and make its group."""


@dataclass(frozen=True, kw_only=True)
class WorkerFacts:
    """What must be the same everywhere, for the bytes to be; has_gpu says what `--device auto` means."""

    radio_cache: str
    torch: str
    has_gpu: bool
    host: str
    pid: int


def worker_facts() -> WorkerFacts:
    """Of this process."""
    return WorkerFacts(
        radio_cache=__version__,
        torch=version("torch"),
        has_gpu=torch.cuda.is_available(),
        host=socket.gethostname(),
        pid=os.getpid(),
    )


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard of one unit. build: tells one run of `radio-cache build` from the next; config.out is absolute.

    unit: a teacher of the config, or IMAGES_UNIT for a first look at the images. shard: or JOIN. witnesses: images that the
    command has read; a worker that reads none of them may judge no image.
    """

    build: str
    config: BuildConfig
    unit: str
    shard: int
    witnesses: tuple[Witness, ...] = ()

    @property
    def key(self) -> str:
        """Of the task among all tasks of its build."""
        return f"{self.unit}-{'join' if self.shard == JOIN else self.shard}"


@dataclass(frozen=True)
class TaskReport:
    """What came of a task. notes: sentences for the user. stage_seconds: as `StageSeconds.to_json`."""

    notes: tuple[str, ...] = ()
    stage_seconds: Mapping[str, float] = field(default_factory=dict[str, float])


def do_task(task: ShardTask) -> TaskReport:
    """Do a task in this process. May be done twice, here or elsewhere.

    Raises ClusterError if this worker cannot see the cache, BlindWorkerError if it does not see the images.
    """
    kept = process_state(task)
    if task.shard == JOIN:
        notes: list[str] = []
        with kept.computing:
            kept.cache = register_teacher(
                kept.cache, kept.teacher, task.config, kept.pool, notes.append, access=kept.access
            )
        return TaskReport(tuple(notes))
    build_shard(task)
    return TaskReport(stage_seconds=kept.spent())


def build_shard(task: ShardTask) -> Receipt:
    """Compute and commit one shard: the unit of work. Writes only that shard's files and its receipt.

    A shard that is there already is left alone.
    """
    kept = process_state(task)
    cache = kept.cache
    if task.unit != IMAGES_UNIT and task.unit not in cache.teachers:
        raise ClusterError(
            f"{here()} sees no teacher '{task.unit}' in {cache.url}, although it was made: a stale mount?"
        )
    there = kept.there(task.shard)
    if there is not None:
        return there
    if task.unit == IMAGES_UNIT:
        return scan_shard(cache, task.shard, kept.pool, kept.access)
    return kept.line.receipt(task.shard)


class _Kept:
    """What a process keeps for the tasks of one unit of one build."""

    def __init__(self, task: ShardTask) -> None:
        self.of = (task.build, task.unit)
        self.computing = threading.Lock()
        self._task = task
        self._loading = threading.Lock()
        self._teacher: Teacher | None = None
        self.pool = ThreadPoolExecutor(task.config.threads, thread_name_prefix="decode")
        self.cache = _visible_cache(task.config)
        self.access = ImageAccess(
            self.cache,
            leave_out=task.config.leave_out_unreadable,
            witnesses=task.witnesses,
            blind=_blind_at(_own_address()),
        )
        self.access.prove_sight()
        self.line = ShardQueue(self._run, self.there)
        self._stages, self._told = StageSeconds(), dict[str, float]()

    @property
    def teacher(self) -> Teacher:
        with self._loading:
            if self._teacher is None:
                teacher = load_teacher(*self._task.config.groups[self._task.unit])
                try:
                    check_same(self.cache, [teacher.spec])
                except RadioCacheError as exc:
                    raise ClusterError(f"{here()} would store something else: {exc}") from exc
                teacher.to(torch.device(self._task.config.device))
                self._teacher = teacher
            return self._teacher

    def there(self, shard: int) -> Receipt | None:
        """The receipt of a shard that has all its rows; None of one that was the last before the cache grew, or that lacks an
        image which can be used by now."""
        receipt = read_receipt(self.cache.storage, self._task.unit, shard)
        finished = is_finished(self.cache.storage, receipt, len(self.cache.meta.shard_rows(shard)))
        return receipt if finished else None

    def _run(self, shards: Iterator[int], committed: Callable[[Receipt], None]) -> None:
        config = with_recorded_batch(self._task.config, self.cache, self._task.unit)
        made = run_shards(
            self.cache,
            self.teacher,
            shards,
            config,
            self.pool,
            self._stages,
            committed=committed,
            access=self.access,
        )
        with contextlib.closing(made):
            for _ in made:
                pass

    def spent(self) -> dict[str, float]:
        """Seconds by stage since this was asked last, whichever shard they were spent on."""
        with self._loading:
            before, self._told = self._told, self._stages.to_json()
            return {stage: seconds - before.get(stage, 0.0) for stage, seconds in self._told.items()}


_last: list[_Kept] = []
_changing = threading.Lock()


def process_state(task: ShardTask) -> _Kept:
    """What this process keeps for a task: made by its first one, and dropped by the first of another unit."""
    with _changing:
        if not _last or _last[0].of != (task.build, task.unit):
            while _last:  # before the next one is made: two teachers need not fit
                _last.pop().line.close()
            gc.collect()  # the line and what it is kept by hold each other
            _last.append(_Kept(task))
        return _last[0]


def _visible_cache(config: BuildConfig) -> Cache:
    place = config.out
    if not is_url(place) and not Path(place).is_absolute():
        raise ClusterError(f"{place} is not absolute: nobody knows where {here()} runs")
    if not is_cache(place):
        raise ClusterError(
            f"{here()} sees no cache at {place}: it must be mounted there under the same path, or be a bucket"
        )
    cache = Cache(place)
    if not is_url(place) and not os.access(place, os.W_OK):
        raise ClusterError(f"{here()} may not write to {place}: have its permissions changed there")
    for container in cache.meta.containers:
        if not is_url(container.path) and not os.path.exists(container.path):  # noqa: PTH110  # a thousand tars
            raise BlindWorkerError(
                f"{here()} does not see the images at {container.path}: they must be mounted there under the same path",
                _own_address(),
            )
    return cache


def _blind_at(address: str) -> Callable[[str], BlindWorkerError]:
    """Return what makes the error of the worker at an address, which does not see the images.

    The address is asked for beforehand: threads that decode do not know whose they are.
    """
    return lambda sentence: BlindWorkerError(f"{here()} does not see the images: {sentence}", address)


def _own_address() -> str:
    """Of this worker at its scheduler; '' where a task is done without one."""
    with contextlib.suppress(ImportError, ValueError):
        from distributed import get_worker

        return str(get_worker().address)
    return ""


def here() -> str:
    """This worker, in words."""
    return f"the worker on {socket.gethostname()} (process {os.getpid()})"
