"""Making things ahead of their use, in threads, in order, in bounded memory."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def prefetch_map(
    pool: ThreadPoolExecutor, make: Callable[[Item], Made], items: Iterable[Item], *, depth: int
) -> Generator[Made]:
    """Yield `map(make, items)` in order, with up to `depth` results computed ahead in the pool.

    An exception of `make` is raised at the position of its result.
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
