"""The stages of a build, overlapped: files are read, decoded and resized in threads while the teacher computes.

Only order and bytes matter to the result: batches are cut within a shard, in row order, so the stored bytes do not
depend on how many threads there are or on what a previous run had already done.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def ahead(pool: ThreadPoolExecutor, make: Callable[[Item], Made], items: Iterable[Item], *, depth: int) -> Iterator[Made]:
    """`map(make, items)` in order, with up to `depth` results being made ahead in the pool. Bounded memory.

    An exception of `make` surfaces where its result would have come.
    """
    waiting: deque[Future[Made]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


@dataclass
class StageSeconds:
    """Where the main thread's time went; the larger of decode and write names the stage that holds the teacher up."""

    decode: float = 0.0
    teacher: float = 0.0
    write: float = 0.0

    def bottleneck(self) -> str:
        """The stage that takes the most of the time, in words for the progress line."""
        stages = {"teacher": self.teacher, "waiting for images": self.decode, "waiting for the disk": self.write}
        total = sum(stages.values())
        name = max(stages, key=lambda stage: stages[stage])
        return f"{name} {stages[name] / total:.0%}" if total > 0 else ""


class Stopwatch:
    """Adds the time a block takes to one field of StageSeconds."""

    def __init__(self, seconds: StageSeconds, stage: str) -> None:
        self._seconds, self._stage, self._started = seconds, stage, 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self._started
        setattr(self._seconds, self._stage, getattr(self._seconds, self._stage) + spent)
