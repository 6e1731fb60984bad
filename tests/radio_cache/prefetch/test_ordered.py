"""Results ahead of their use: in order, bounded, and errors where they belong."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from radio_cache.prefetch.ordered import prefetch_map


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_results_come_in_order_whatever_the_threads_do(depth: int) -> None:
    def slow_for_even(number: int) -> int:
        time.sleep(0.004 if number % 2 == 0 else 0)
        return number * number

    with ThreadPoolExecutor(4) as pool:
        assert list(prefetch_map(pool, slow_for_even, range(20), depth=depth)) == [number**2 for number in range(20)]


def test_no_more_than_depth_results_are_made_ahead() -> None:
    made: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        results = prefetch_map(pool, made.append, range(100), depth=5)
        for consumed in range(1, 11):
            next(results)
            time.sleep(0.002)
            assert len(made) < consumed + 5
        results.close()


def test_an_error_surfaces_where_its_result_would_have_come_and_cancels_the_rest() -> None:
    started: list[int] = []
    gate = threading.Event()

    def fail_at_two(number: int) -> int:
        started.append(number)
        if number == 2:
            raise OSError("gone")
        if number > 2:
            gate.wait(5)
        return number

    with ThreadPoolExecutor(1) as pool:
        results = prefetch_map(pool, fail_at_two, range(50), depth=10)
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(OSError, match="gone"):
            next(results)
        gate.set()
    assert max(started) < 12
