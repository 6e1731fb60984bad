"""The queue of a build's tasks: which are handed out next, and which are abandoned after failures. Knows no scheduler."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import final

from cache_builder.workers.worker import BuildTask, CalibrationTask
from radio_cache.errors import CodecError, RadioCacheError, SourceError

MAX_DEATHS = 3
"""Worker deaths, or failures, after which a task is abandoned."""

TASKS_PER_WORKER = 4
"""Tasks in a worker's queue. On a fast GPU images are decoded more than a shard ahead, and a finished task takes a while to
be replaced."""

MAX_CALIBRATION_DEATHS = 10
"""Worker deaths after which a calibration is abandoned. It takes as long as many shards, all on one worker, and nothing can
follow if it fails."""


@dataclass(frozen=True)
class AbandonedTask:
    """A task that no worker could do, and the reason."""

    task: BuildTask
    reason: str


@final
@dataclass
class TaskQueue:
    """Tasks of one unit.

    A scheduler blames a worker's death on all tasks that the worker had. Before a task is abandoned it therefore runs once
    more in isolation, while no other task runs.

    Attributes:
        pending: tasks to hand out.
        isolated: tasks to hand out when no other task is in flight.
        deaths: key of a task -> worker deaths during it.
        failures: key of a task -> errors that it raised.
        abandoned: tasks that are not handed out again.
    """

    pending: deque[BuildTask]
    isolated: deque[BuildTask] = field(default_factory=deque[BuildTask])
    deaths: dict[str, int] = field(default_factory=dict[str, int])
    failures: dict[str, int] = field(default_factory=dict[str, int])
    abandoned: list[AbandonedTask] = field(default_factory=list[AbandonedTask])

    @classmethod
    def of(cls, tasks: Iterable[BuildTask]) -> "TaskQueue":
        """Return a queue of these tasks."""
        return cls(deque(tasks))

    @property
    def is_empty(self) -> bool:
        """Whether no task is left to hand out."""
        return not self.pending and not self.isolated

    def take(self, *, in_flight: int, room: int) -> list[BuildTask]:
        """Remove and return the next tasks to hand out.

        Args:
            in_flight: number of tasks that are handed out and not completed.
            room: number of further tasks that may be.
        """
        # Isolated tasks come last, so that they hold up no other task.
        if not self.pending and self.isolated:
            return [self.isolated.popleft()] if in_flight == 0 else []
        return [self.pending.popleft() for _ in range(min(room, len(self.pending)))]

    def room(self, *, in_flight: int, workers: int) -> int:
        """Return how many more tasks may be handed out.

        Each worker gets several tasks, of which it computes one while the others wait in its queue. Towards the end they get
        fewer, so that no task waits for one worker while another is idle.
        """
        # Half of the remaining tasks are spread over the workers, the rest waits for whoever is faster.
        num_tasks = in_flight + len(self.pending) + len(self.isolated)
        tasks_per_worker = min(max(num_tasks // (2 * max(workers, 1)), 1), TASKS_PER_WORKER)
        return tasks_per_worker * workers - in_flight

    def put_back(self, tasks: Iterable[BuildTask]) -> None:
        """Return tasks to the front of the queue whose fate is unknown."""
        self.pending.extendleft(tasks)

    def record_worker_deaths(self, task: BuildTask, num_workers: int, *, was_alone: bool) -> None:
        """Record that workers died during a task, and queue it again or abandon it.

        Args:
            task: the task.
            num_workers: number of workers that died since it was handed out.
            was_alone: whether no other task ran on them.
        """
        self.deaths[task.key] = self.deaths.get(task.key, 0) + num_workers
        max_deaths = MAX_CALIBRATION_DEATHS if isinstance(task, CalibrationTask) else MAX_DEATHS
        # The last attempt is made in isolation, so that a neighbour's fault is not blamed on this task.
        if self.deaths[task.key] < max_deaths - 1:
            self.pending.append(task)
        elif self.deaths[task.key] < max_deaths or not was_alone:
            self.isolated.append(task)
        else:
            reason = f"{self.deaths[task.key]} workers died on it: out of memory, or a file that crashes a library"
            self.abandoned.append(AbandonedTask(task, reason))

    def record_failure(self, task: BuildTask, error: BaseException) -> None:
        """Record an error that a task raised, and queue the task again or abandon it.

        Raises:
            RadioCacheError: the error itself, if other shards would fail alike: no weights, no cache, a full disk.
        """
        # A fault of these images: other shards are not affected, and a retry fails alike.
        if isinstance(error, CodecError | SourceError):
            self.abandoned.append(AbandonedTask(task, str(error)))
            return
        # A fault of the whole build, which every other shard would meet.
        if isinstance(error, RadioCacheError):
            raise error
        self.failures[task.key] = self.failures.get(task.key, 0) + 1
        if self.failures[task.key] < MAX_DEATHS:
            self.pending.append(task)
        else:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            self.abandoned.append(AbandonedTask(task, reason))
