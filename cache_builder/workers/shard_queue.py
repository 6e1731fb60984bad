"""The queue of shards in a worker process: it holds several, so that the device need not wait between them.

While one shard is computed, images of the next are decoded, and the one before is written (`run_shards`).
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import final

from radio_cache.format.schema import Receipt

OnCommitted = Callable[[Receipt], None]

Run = Callable[[Iterator[int], OnCommitted], None]
"""Makes shards as they come, and reports each, in that order, when it is on disk."""


@final
class ShardQueue:
    """Makes the shards that threads request, in the order of the requests, in a thread of its own.

    Args:
        run: makes shards. It also takes those that are requested while it runs, and ends when there are none.
        finished_receipt: returns the receipt of a shard whose files are all there, or None.
    """

    def __init__(self, run: Run, finished_receipt: Callable[[int], Receipt | None]) -> None:
        self._run, self._finished_receipt = run, finished_receipt
        self._lock = threading.Lock()
        self._requested: deque[int] = deque()
        self._in_flight: deque[int] = deque()  # taken by `run`, and not on disk yet
        self._receipts: dict[int, Future[Receipt]] = {}
        self._is_running = False
        # One thread, because a device computes one shard at a time.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")

    def receipt(self, shard: int) -> Receipt:
        """Return the receipt of a shard, after it has been made. Raise the error of making it."""
        with self._lock:
            if shard not in self._receipts:  # a scheduler that was lost may request it again
                self._receipts[shard] = Future()
                self._requested.append(shard)
            receipt = self._receipts[shard]
            # The thread ends when no shard is requested, and is started again by the next request.
            if not self._is_running:
                self._is_running = True
                self._thread.submit(self._work)
        return receipt.result()

    def close(self) -> None:
        """Wait until no shard is being made, so that the memory can be freed."""
        self._thread.shutdown(wait=True)

    def _work(self) -> None:
        while True:
            try:
                self._run(self._shards(), lambda receipt: self._resolve(self._in_flight.popleft(), receipt))
            except BaseException as exc:  # raised again in the thread that waits for the shard
                self._fail_first(exc)
            with self._lock:
                if not self._requested:
                    self._is_running = False
                    return

    def _shards(self) -> Iterator[int]:
        while True:
            with self._lock:
                if not self._requested:
                    return
                shard = self._requested.popleft()
                # Under the lock: an error must find the shard in one of the two queues.
                self._in_flight.append(shard)
            yield shard

    def _resolve(self, shard: int, outcome: Receipt | BaseException) -> None:
        with self._lock:
            # Removed, so that a later request makes the shard again if its files are gone.
            receipt = self._receipts.pop(shard)
        if isinstance(outcome, BaseException):
            receipt.set_exception(outcome)
        else:
            receipt.set_result(outcome)

    def _fail_first(self, error: BaseException) -> None:
        """Blame the error on the first shard that is not finished, and queue those behind it again."""
        if not self._in_flight:  # the error came before a shard was taken
            next(self._shards(), None)
        while self._in_flight:
            shard = self._in_flight.popleft()
            receipt = self._finished_receipt(shard)
            self._resolve(shard, error if receipt is None else receipt)
            if receipt is None:
                break
        with self._lock:
            # In front, in their order: their tasks have waited longest.
            self._requested.extendleft(reversed(self._in_flight))
        self._in_flight.clear()
