"""Which tasks of a build are to be handed out, and which are given up: the rules about failures, without a scheduler."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from cache_builder.workers.worker import JOIN, ShardTask
from radio_cache.errors import CodecError, RadioCacheError, SourceError

MAX_DEATHS = 3
"""A task that so many workers did not survive is given up; so is one that failed so often."""

TASKS_PER_WORKER = 4
"""Of one worker. On a fast GPU images are decoded more than a shard ahead, and a finished shard takes a while to be replaced."""

MAX_CALIBRATION_DEATHS = 10
"""Of a codec's calibration, which takes as long as many shards, all on one worker, and stops everything if it fails."""


@dataclass(frozen=True)
class AbandonedTask:
    """A task that nobody could do, and why."""

    task: ShardTask
    why: str


@dataclass
class TaskQueue:
    """The tasks of one unit. A scheduler blames all tasks that a worker had when it died: before a task is given up, it runs
    once more while nothing else does.
    """

    waiting: deque[ShardTask]
    alone: deque[ShardTask] = field(default_factory=deque[ShardTask])
    deaths: dict[str, int] = field(default_factory=dict[str, int])
    faults: dict[str, int] = field(default_factory=dict[str, int])
    abandoned: list[AbandonedTask] = field(default_factory=list[AbandonedTask])

    @classmethod
    def of(cls, tasks: Iterable[ShardTask]) -> "TaskQueue":
        return cls(deque(tasks))

    @property
    def is_empty(self) -> bool:
        return not self.waiting and not self.alone

    def take(self, *, flying: int, room: int) -> list[ShardTask]:
        """The next tasks to hand out. flying: how many are out; room: how many more may be."""
        if not self.waiting and self.alone:
            return [self.alone.popleft()] if flying == 0 else []
        return [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]

    def room(self, *, flying: int, workers: int) -> int:
        """How many more may be handed out: several for each worker, one of which it computes while the others stand in line;
        fewer towards the end, so that none waits in one worker's line while another has nothing to do."""
        left = flying + len(self.waiting) + len(self.alone)
        each = min(max(left // (2 * max(workers, 1)), 1), TASKS_PER_WORKER)
        return each * workers - flying

    def put_back(self, tasks: Iterable[ShardTask]) -> None:
        """These were handed out, and nobody knows what became of them."""
        self.waiting.extendleft(tasks)

    def died(self, task: ShardTask, workers: int, *, was_alone: bool) -> None:
        """So many more workers did not survive it. was_alone: whether nothing else ran on them."""
        self.deaths[task.key] = self.deaths.get(task.key, 0) + workers
        most = MAX_CALIBRATION_DEATHS if task.shard == JOIN else MAX_DEATHS
        if self.deaths[task.key] < most - 1:
            self.waiting.append(task)
        elif self.deaths[task.key] < most or not was_alone:
            self.alone.append(task)
        else:
            why = f"{self.deaths[task.key]} workers died on it: out of memory, or a file that crashes a library"
            self.abandoned.append(AbandonedTask(task, why))

    def failed(self, task: ShardTask, error: BaseException) -> None:
        """It raised an error. Raises it again if another shard would fail just so: no weights, no cache, a full disk."""
        if isinstance(error, CodecError | SourceError):
            self.abandoned.append(AbandonedTask(task, str(error)))
            return
        if isinstance(error, RadioCacheError):
            raise error
        self.faults[task.key] = self.faults.get(task.key, 0) + 1
        if self.faults[task.key] < MAX_DEATHS:
            self.waiting.append(task)
        else:
            self.abandoned.append(AbandonedTask(task, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"))
