"""Batches ahead of their use: in order, in few buffers, errors where they belong, and no thread left behind."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from radio_cache.errors import ConfigError
from radio_cache.prefetch.buffers import BufferRing


def ring_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ring-")]


def fill(item: int, buffer: np.ndarray) -> np.ndarray:
    time.sleep(0.002 if item % 3 == 0 else 0)
    buffer[:] = item
    return buffer


def buffer() -> np.ndarray:
    return np.zeros(4, np.int64)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("depth", [1, 3, 50])
def test_items_come_in_order_whatever_the_threads_do(depth: int, threads: int) -> None:
    with BufferRing(range(30), fill, buffer, depth=depth, threads=threads) as ring:
        assert [made.tolist() for made in ring] == [[item] * 4 for item in range(30)]
        assert list(ring) == []
    assert ring_threads() == []


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_items_handed_out_stay_as_they_are_and_memory_is_bounded(keep: int) -> None:
    made_buffers: list[np.ndarray] = []

    def counted() -> np.ndarray:
        made_buffers.append(buffer())
        return made_buffers[-1]

    handed: list[np.ndarray] = []
    with BufferRing(range(40), fill, counted, depth=2, threads=3, keep=keep) as ring:
        for item, made in enumerate(ring):
            handed = [*handed, made][-keep:]
            time.sleep(0.001)  # time enough for a thread to spoil what it may not touch
            assert [int(each[0]) for each in handed] == list(range(max(0, item - keep + 1), item + 1))
    assert len(made_buffers) == 2 + keep


def test_buffers_handed_back_last_are_filled_next() -> None:
    """So that a ring far deeper than it needs to be still stays in the processor's cache."""
    wanted = threading.Semaphore(0)

    def when_wanted(item: int, buffer: np.ndarray) -> np.ndarray:
        wanted.acquire()
        return buffer

    used: set[int] = set()
    with BufferRing(range(30), when_wanted, buffer, depth=8, threads=1) as ring:
        for _ in range(30):
            wanted.release()
            used.add(id(next(ring)))
    assert len(used) <= 3


def test_items_are_taken_no_further_ahead_than_there_are_buffers() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    with BufferRing(items(), fill, buffer, depth=3, threads=2) as ring:
        for consumed, _ in enumerate(ring, start=1):
            time.sleep(0.002)
            assert len(taken) <= consumed + 3
            if consumed == 10:
                break


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_of_fill_surfaces_in_its_place_and_ends_the_ring(threads: int) -> None:
    def fail_at_seven(item: int, buffer: np.ndarray) -> int:
        if item == 7:
            raise ValueError("seven")
        return int(fill(item, buffer)[0])

    seen: list[int] = []
    with (
        pytest.raises(ValueError, match="seven"),
        BufferRing(range(100), fail_at_seven, buffer, threads=threads) as ring,
    ):
        seen.extend(ring)
    assert seen == list(range(7))
    assert ring_threads() == []


def test_an_error_of_the_items_surfaces_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise KeyError("no more rows")

    seen: list[int] = []
    with pytest.raises(KeyError, match="no more rows"), BufferRing(items(), fill, buffer) as ring:
        seen.extend(int(made[0]) for made in ring)
    assert seen == [0, 1, 2]


def test_an_error_of_the_consumer_leaves_no_thread_behind() -> None:
    def train() -> None:
        with BufferRing(range(10**9), fill, buffer, threads=4) as ring:
            next(ring)
            raise RuntimeError("loss is NaN")

    with pytest.raises(RuntimeError, match="loss is NaN"):
        train()
    assert ring_threads() == []
    with BufferRing(range(10**9), fill, buffer, threads=4):
        pass  # nothing taken at all
    assert ring_threads() == []


def test_an_empty_ring_ends_at_once() -> None:
    with BufferRing([], fill, buffer) as ring:
        assert list(ring) == []


@pytest.mark.parametrize("setting", ["depth", "threads", "keep"])
def test_impossible_settings_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        BufferRing(range(3), fill, buffer, **{setting: 0})
