"""Batches made ahead of their use, in threads, in buffers that are used again and again.

Fresh memory costs more than reading does: a ring fills the same few buffers for a whole run, so that memory is bounded,
stays mapped, and may be pinned for copies to a device (that is for `make_buffers` to decide).
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Generic, Never, Self, TypeVar, final

from radio_cache.errors import ConfigError

Item = TypeVar("Item")
Buffers = TypeVar("Buffers")
Made = TypeVar("Made")


@final
class BufferRing(Generic[Item, Buffers, Made]):
    """`fill(item, buffers)` of every item, in the items' order, made ahead in background threads.

        with BufferRing(batches_of_rows, fill, make_buffers, depth=4, threads=2) as ring:
            for made in ring: ...

    items: what to make; taken one by one, by one thread at a time, no further ahead than there are buffers.
    fill: writes one item into buffers and returns what the consumer gets (the buffers themselves, or something that
        holds them). Runs in several threads at once, never twice in the same buffers.
    make_buffers: called depth + keep times, in the consumer's thread, when the ring is entered.
    depth: items made ahead; as many as there are threads, or a few more where fills are uneven, but no more: buffers that the
        processor's cache holds together are filled faster.
    keep: how many of the last items handed out stay as they are while the next is awaited: 1 is the current one; a consumer
        that copies to a device asynchronously needs one more for each copy still running.

    An exception of `fill` or of `items` is raised where its item would have come; nothing comes after it. Leaving the
    `with` block waits for the fills that are running and leaves no thread behind.
    """

    def __init__(
        self,
        items: Iterable[Item],
        fill: Callable[[Item, Buffers], Made],
        make_buffers: Callable[[], Buffers],
        *,
        depth: int = 4,
        threads: int = 2,
        keep: int = 1,
    ) -> None:
        if depth < 1 or threads < 1 or keep < 1:
            raise ConfigError(f"a ring needs depth, threads and keep of at least 1, not {depth}, {threads} and {keep}")
        self._items, self._fill, self._make_buffers = iter(items), fill, make_buffers
        self._depth, self._keep = depth, keep
        # Last in, first out: the processor's cache may still hold the buffers returned last. None ends a thread.
        self._free: queue.LifoQueue[Buffers | None] = queue.LifoQueue()
        # Held while an item is taken: a generator refuses concurrent calls of `next`.
        self._taking = threading.Lock()
        self._taken = 0
        self._changed = threading.Condition()
        self._done: dict[int, Callable[[], tuple[Made, Buffers]]] = {}  # by item number; calling it may raise
        self._length: int | None = None
        self._handed = 0
        self._held: deque[Buffers] = deque()
        self._threads = [threading.Thread(target=self._work, name=f"ring-{n}", daemon=True) for n in range(threads)]

    def __enter__(self) -> Self:
        for buffers in [self._make_buffers() for _ in range(self._depth + self._keep)]:
            self._free.put(buffers)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._length = 0  # a thread that takes an item from now on finds none
        for _ in self._threads:
            self._free.put(None)
        for thread in self._threads:
            thread.join()
        self._done.clear()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Made:
        # Before the wait: the threads may need these buffers for the item that is waited for.
        while len(self._held) >= self._keep:
            self._free.put(self._held.popleft())
        with self._changed:
            self._changed.wait_for(lambda: self._handed in self._done or self._ended(self._handed))
            if self._handed not in self._done:
                raise StopIteration
            result, buffers = self._done.pop(self._handed)()
        self._handed += 1
        self._held.append(buffers)
        return result

    def _ended(self, number: int) -> bool:
        return self._length is not None and number >= self._length

    def _work(self) -> None:
        # Buffers before an item: otherwise the item that the consumer waits for could lack buffers forever.
        while (buffers := self._free.get()) is not None:
            with self._taking:
                number = self._taken
                if self._ended(number):
                    return
                self._taken += 1
                try:
                    item = next(self._items)
                except StopIteration:
                    self._finish(number)
                    return
                except BaseException as exc:
                    self._report(number, _raiser(exc))
                    self._finish(number + 1)
                    return
            try:
                result = self._fill(item, buffers)
                self._report(number, _giver(result, buffers))
                del result
            except BaseException as exc:
                self._report(number, _raiser(exc))
                self._finish(number + 1)
            # Not kept while waiting: a reference would hold a whole batch in memory.
            del item, buffers

    def _report(self, number: int, result: Callable[[], tuple[Made, Buffers]]) -> None:
        with self._changed:
            self._done[number] = result
            self._changed.notify_all()

    def _finish(self, length: int) -> None:
        """Record that there are at most `length` items to hand out, and wake the consumer."""
        with self._changed:
            self._length = length if self._length is None else min(length, self._length)
            self._changed.notify_all()


def _giver(result: Made, buffers: Buffers) -> Callable[[], tuple[Made, Buffers]]:
    return lambda: (result, buffers)


def _raiser(error: BaseException) -> Callable[[], Never]:
    def fail() -> Never:
        raise error

    return fail
