"""Shards asked for by several threads: in order, one line, each made once, and an error reaches whom it concerns."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from cache_builder.workers.shard_queue import ShardQueue
from radio_cache.errors import CodecError
from radio_cache.format.schema import Receipt


def receipt_of(shard: int) -> Receipt:
    return Receipt(unit="t", shard=shard, first_row=10 * shard, num_rows=10, num_tokens=0, failures=(), files=())


class Maker:
    """Makes shards as `run_shards` does: tells of each when the next has been taken, and of the last at the end."""

    def __init__(self, broken: int | None = None) -> None:
        self.broken, self.runs = broken, list[list[int]]()
        self.there: dict[int, Receipt] = {}
        self.may_begin = threading.Event()

    def __call__(self, shards: Iterator[int], committed: Callable[[Receipt], None]) -> None:
        run: list[int] = []
        self.runs.append(run)
        assert self.may_begin.wait(10)
        last: int | None = None
        for shard in shards:
            run.append(shard)
            if last is not None:
                self._write(last, committed)
            if shard == self.broken:
                raise CodecError(f"shard {shard} holds what no codec keeps")
            last = shard
        if last is not None:
            self._write(last, committed)

    def _write(self, shard: int, committed: Callable[[Receipt], None]) -> None:
        self.there[shard] = receipt_of(shard)
        committed(self.there[shard])


def asked(maker: Maker, shards: list[int]) -> list[Receipt | BaseException]:
    """The answers to threads that ask for these shards, all before the first is begun."""
    line = ShardQueue(maker, maker.there.get)
    with ThreadPoolExecutor(len(shards)) as pool:
        waiting = []
        for number, shard in enumerate(shards):
            waiting.append(pool.submit(line.receipt, shard))
            while len(line._receipts) < len(set(shards[: number + 1])):  # so that the order is known
                pass
        maker.may_begin.set()
        return [one.exception(10) or one.result() for one in waiting]


def test_what_is_asked_for_meanwhile_stands_in_one_line() -> None:
    maker = Maker()
    assert asked(maker, [3, 1, 2]) == [receipt_of(3), receipt_of(1), receipt_of(2)]
    assert maker.runs == [[3, 1, 2]]


def test_an_error_reaches_its_own_shard_and_the_others_are_made() -> None:
    maker = Maker(broken=1)
    first, second, *others = asked(maker, [3, 1, 2, 4])
    assert first == receipt_of(3)
    assert isinstance(second, CodecError)
    assert others == [receipt_of(2), receipt_of(4)]
    assert maker.runs == [[3, 1], [2, 4]]


def test_a_shard_that_is_asked_for_twice_is_made_once() -> None:
    maker = Maker()
    assert asked(maker, [5, 5]) == [receipt_of(5)] * 2
    assert maker.runs == [[5]]


def test_a_line_that_has_ended_begins_again() -> None:
    maker = Maker()
    maker.may_begin.set()
    line = ShardQueue(maker, maker.there.get)
    assert [line.receipt(shard).first_row for shard in (0, 1, 0)] == [0, 10, 0]


def test_an_error_before_the_first_shard_is_taken_reaches_somebody() -> None:
    def unable(shards: Iterator[int], committed: Callable[[Receipt], None]) -> None:
        raise CodecError("no teacher")

    with pytest.raises(CodecError, match="no teacher"):
        ShardQueue(unable, lambda _: None).receipt(1)
