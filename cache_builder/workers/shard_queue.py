"""Shards one behind the other: a worker is given several, so that its device need not wait between them.

While one is computed, images of the next are decoded, and the last one is written (`run_shards`).
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import final

from radio_cache.format.schema import Receipt

Committed = Callable[[Receipt], None]

Run = Callable[[Iterator[int], Committed], None]
"""Makes shards as they come, and tells of each, in that order, when it is on disk."""


@final
class ShardQueue:
    """Makes the shards that threads ask for, in that order, in a thread of its own.

    run: takes what is asked for while it runs, too; it ends when nothing is. made: the receipt of a shard if all of it is there.
    """

    def __init__(self, run: Run, made: Callable[[int], Receipt | None]) -> None:
        self._run, self._made = run, made
        self._lock = threading.Lock()
        self._asked: deque[int] = deque()
        self._taken: deque[int] = deque()  # and not on disk yet
        self._answers: dict[int, Future[Receipt]] = {}
        self._running = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")

    def receipt(self, shard: int) -> Receipt:
        """Have a shard made, and wait for it. Raises what making it raised."""
        with self._lock:
            if shard not in self._answers:  # a scheduler that was lost may ask again
                self._answers[shard] = Future()
                self._asked.append(shard)
            answer = self._answers[shard]
            if not self._running:
                self._running = True
                self._thread.submit(self._work)
        return answer.result()

    def close(self) -> None:
        """Wait until nothing is being made any more, for whoever needs its memory."""
        self._thread.shutdown(wait=True)

    def _work(self) -> None:
        while True:
            try:
                self._run(self._shards(), lambda receipt: self._answer(self._taken.popleft(), receipt))
            except BaseException as exc:  # whoever waits for it is to have it, whatever it is
                self._failed(exc)
            with self._lock:
                if not self._asked:
                    self._running = False
                    return

    def _shards(self) -> Iterator[int]:
        while True:
            with self._lock:
                if not self._asked:
                    return
                shard = self._asked.popleft()
                self._taken.append(shard)
            yield shard

    def _answer(self, shard: int, found: Receipt | BaseException) -> None:
        with self._lock:
            answer = self._answers.pop(shard)
        if isinstance(found, BaseException):
            answer.set_exception(found)
        else:
            answer.set_result(found)

    def _failed(self, error: BaseException) -> None:
        """The first shard that is not there is the one that failed; those behind it get another turn."""
        if not self._taken:  # it failed before it took one
            next(self._shards(), None)
        while self._taken:
            shard = self._taken.popleft()
            made = self._made(shard)
            self._answer(shard, error if made is None else made)
            if made is None:
                break
        with self._lock:
            self._asked.extendleft(reversed(self._taken))
        self._taken.clear()
