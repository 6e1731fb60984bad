"""Tasks of worker processes: small, picklable, and with all that a worker needs.

A worker process keeps the cache, the teacher and its threads from one task to the next. It computes one shard at a time. Tasks
that arrive meanwhile wait in a queue, so that the device goes from one to the next without a pause.
"""

import contextlib
import gc
import os
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import final

import torch

from cache_builder.build_config import BuildConfig
from cache_builder.build_output import check_same
from cache_builder.computed_with import with_recorded_batch
from cache_builder.pipeline.events import BuildEvents
from cache_builder.pipeline.image_access import ImageAccess, Witness
from cache_builder.pipeline.passes import codec_sample, register_teacher
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


@dataclass(frozen=True, kw_only=True)
class WorkerFacts:
    """Properties of a worker process. Those of software must be equal everywhere, or the stored bytes would differ.

    Attributes:
        radio_cache: version.
        torch: version.
        has_gpu: decides what `--device auto` means.
        host: name of the machine.
        pid: number of the process.
    """

    radio_cache: str
    torch: str
    has_gpu: bool
    host: str
    pid: int


def worker_facts() -> WorkerFacts:
    """Return the facts of this process."""
    return WorkerFacts(
        radio_cache=__version__,
        torch=version("torch"),
        has_gpu=torch.cuda.is_available(),
        host=socket.gethostname(),
        pid=os.getpid(),
    )


@dataclass(frozen=True, kw_only=True)
class BuildTask(ABC):
    """A task of one unit of a build.

    Attributes:
        build: identifies one run of `radio-cache build`.
        config: the configuration, whose `out` is absolute.
        unit: a teacher of the configuration, or IMAGES_UNIT for the scan.
        witnesses: images that the command has read; a worker that reads none of them may judge no image.
    """

    build: str
    config: BuildConfig
    unit: str
    witnesses: tuple[Witness, ...] = ()

    @property
    @abstractmethod
    def key(self) -> str:
        """Name of the task among all tasks of its build."""


@final
@dataclass(frozen=True, kw_only=True)
class CalibrationTask(BuildTask):
    """Choose the codec of a teacher, and register the teacher in the cache."""

    @property
    def key(self) -> str:
        """Name of the task among all tasks of its build."""
        return f"{self.unit}-calibration"


@final
@dataclass(frozen=True, kw_only=True)
class ShardTask(BuildTask):
    """Make one shard: of a teacher, or of the scan."""

    shard: int

    @property
    def key(self) -> str:
        """Name of the task among all tasks of its build."""
        return f"{self.unit}-{self.shard}"


@dataclass(frozen=True)
class TaskReport:
    """Result of a task: sentences for the user, and seconds by stage as `StageSeconds.to_json` returns them."""

    notes: tuple[str, ...] = ()
    stage_seconds: Mapping[str, float] = field(default_factory=dict[str, float])


def do_task(task: BuildTask) -> TaskReport:
    """Do a task in this process. The same task may be done twice, here or elsewhere.

    Raises:
        ClusterError: this worker cannot see the cache.
        BlindWorkerError: it does not see the images.
    """
    state = _state_for(task)
    match task:
        case CalibrationTask():
            return TaskReport(tuple(state.calibrate()))
        case ShardTask():
            build_shard(task)
            return TaskReport(stage_seconds=state.take_stage_seconds())
        case _:
            raise AssertionError(f"unknown task {task}")


def build_shard(task: ShardTask) -> Receipt:
    """Compute and commit one shard, the unit of work. Writes only that shard's files and its receipt.

    A shard that is finished already is left alone.
    """
    state = _state_for(task)
    cache = state.cache
    if task.unit != IMAGES_UNIT and task.unit not in cache.teachers:
        raise ClusterError(
            f"{worker_name()} sees no teacher '{task.unit}' in {cache.url}, although it was made: a stale mount?"
        )
    # A task may come twice, when a scheduler was lost.
    finished = state.finished_receipt(task.shard)
    if finished is not None:
        return finished
    if task.unit == IMAGES_UNIT:
        return scan_shard(cache, task.shard, state.pool, state.access)
    return state.queue.receipt(task.shard)


@final
class _QueueEvents(BuildEvents):
    """Events of a worker's shards: each committed shard is handed to the thread that waits for it."""

    def __init__(self, on_committed: Callable[[Receipt], None]) -> None:
        self._on_committed = on_committed

    def committed(self, receipt: Receipt) -> None:
        self._on_committed(receipt)


@final
class _NotedEvents(BuildEvents):
    """Events whose messages are kept, to be reported with the task."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def message(self, sentence: str) -> None:
        self.notes.append(sentence)


class _ProcessState:
    """State that a process keeps for the tasks of one unit of one build."""

    def __init__(self, task: BuildTask) -> None:
        self.key = (task.build, task.unit)
        self._computing = threading.Lock()
        self._task = task
        self._loading = threading.Lock()
        self._teacher: Teacher | None = None
        self.pool = ThreadPoolExecutor(task.config.threads, thread_name_prefix="decode")
        self.cache = _visible_cache(task.config)
        self.access = ImageAccess(
            self.cache,
            leave_out=task.config.leave_out_unreadable,
            witnesses=task.witnesses,
            blind=_blind_worker_error_at(_own_address()),
        )
        # Before the first task: a worker that sees no image would call all of them unreadable.
        self.access.prove_sight()
        self.queue = ShardQueue(self._run, self.finished_receipt)
        self._stages, self._reported_seconds = StageSeconds(), dict[str, float]()

    @property
    def teacher(self) -> Teacher:
        """The teacher of the unit, on its device; loaded at the first use."""
        # Threads of several tasks come here at once, and two teachers may not fit.
        with self._loading:
            if self._teacher is None:
                teacher = load_teacher(*self._task.config.groups[self._task.unit])
                try:
                    # Another version of a library here would store other features under the same name.
                    check_same(self.cache, [teacher.spec])
                except RadioCacheError as exc:
                    raise ClusterError(f"{worker_name()} would store something else: {exc}") from exc
                teacher.to(torch.device(self._task.config.device))
                self._teacher = teacher
            return self._teacher

    def calibrate(self) -> list[str]:
        """Register the teacher unless the cache has it, and return messages about its codec."""
        events, config = _NotedEvents(), self._task.config
        with self._computing:
            spec = self.teacher.spec
            if spec.name not in self.cache.teachers:
                # The scan has run before, so a sample of all images is at hand.
                sample = codec_sample(self.cache, spec, config, self.pool, self.access) or []
                register_teacher(self.cache, self.teacher, sample, config, self.pool, events, self.access)
            self.cache = self.cache.reopened()
            check_same(self.cache, [spec])
        return events.notes

    def finished_receipt(self, shard: int) -> Receipt | None:
        """Return the receipt of a shard that has all its rows.

        None for the shard that was the last one before the cache grew, and for one that lacks an image which can be used by
        now.
        """
        # Read from the cache each time: another worker may have made the shard.
        receipt = read_receipt(self.cache.storage, self._task.unit, shard)
        is_whole = is_finished(self.cache.storage, receipt, len(self.cache.meta.shard_rows(shard)))
        return receipt if is_whole else None

    def _run(self, shards: Iterator[int], on_committed: Callable[[Receipt], None]) -> None:
        config = with_recorded_batch(self._task.config, self.cache, self._task.unit)
        events = _QueueEvents(on_committed)
        receipts = run_shards(self.cache, self.teacher, shards, config, self.pool, self._stages, events, self.access)
        with contextlib.closing(receipts):
            for _ in receipts:
                pass

    def take_stage_seconds(self) -> dict[str, float]:
        """Return seconds by stage since the last call, whichever shard they were spent on."""
        with self._loading:
            # Differences, because several tasks share the stages of one process.
            before, self._reported_seconds = self._reported_seconds, self._stages.to_json()
            return {stage: seconds - before.get(stage, 0.0) for stage, seconds in self._reported_seconds.items()}


_states: list[_ProcessState] = []
"""The state of the current unit; at most one."""

_changing_state = threading.Lock()


def _state_for(task: BuildTask) -> _ProcessState:
    """Return the state of this process for a task, made anew for the first task of a unit."""
    with _changing_state:
        if not _states or _states[0].key != (task.build, task.unit):
            while _states:  # before the next one is made: two teachers need not fit into memory
                _states.pop().queue.close()
            gc.collect()  # the state and its queue refer to each other
            _states.append(_ProcessState(task))
        return _states[0]


def _visible_cache(config: BuildConfig) -> Cache:
    path_or_url = config.out
    if not is_url(path_or_url) and not Path(path_or_url).is_absolute():
        raise ClusterError(
            f"{path_or_url} is not absolute, and the working folder of {worker_name()} is unknown: name an absolute path"
        )
    if not is_cache(path_or_url):
        raise ClusterError(
            f"{worker_name()} sees no cache at {path_or_url}: it must be mounted there under the same path, or be a bucket"
        )
    cache = Cache(path_or_url)
    # Found out here, not after minutes of computing.
    if not is_url(path_or_url) and not os.access(path_or_url, os.W_OK):
        raise ClusterError(f"{worker_name()} may not write to {path_or_url}: have its permissions changed there")
    for container in cache.meta.containers:
        if not is_url(container.path) and not os.path.exists(container.path):  # noqa: PTH110  # a thousand tars
            raise BlindWorkerError(
                f"{worker_name()} does not see the images at {container.path}: they must be mounted there under the same path",
                _own_address(),
            )
    return cache


def _blind_worker_error_at(address: str) -> Callable[[str], BlindWorkerError]:
    """Return a function that makes the error of the worker at an address, which does not see the images.

    The address is found beforehand, because threads that decode do not know which worker they belong to.
    """
    return lambda sentence: BlindWorkerError(f"{worker_name()} does not see the images: {sentence}", address)


def _own_address() -> str:
    """Return the address of this worker at its scheduler, or '' if a task is done without one."""
    with contextlib.suppress(ImportError, ValueError):
        from distributed import get_worker

        return str(get_worker().address)
    return ""


def worker_name() -> str:
    """Return the name of this worker for messages."""
    return f"the worker on {socket.gethostname()} (process {os.getpid()})"
