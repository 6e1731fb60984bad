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
            # Submitted before the yield, so that the pool works while the consumer uses a result.
            waiting.append(pool.submit(make, item))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # The consumer stopped or a result raised: what has not begun is not needed.
        for future in waiting:
            future.cancel()
