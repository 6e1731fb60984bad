"""The rules about tasks that fail: who is tried again, who alone, who is given up."""

from pathlib import Path

import pytest

from cache_builder.build_config import BuildConfig
from cache_builder.teachers import TeacherOptions
from cache_builder.workers.task_queue import MAX_CALIBRATION_DEATHS, MAX_DEATHS, TaskQueue
from cache_builder.workers.worker import CalibrationTask, ShardTask
from radio_cache.errors import ClusterError, CodecError, StorageError

CONFIG = BuildConfig(images=("a",), teachers={"fake-a": TeacherOptions()}, out=Path("/nowhere"))


CALIBRATION = CalibrationTask(build="x", config=CONFIG, unit="fake-a")


def task(shard: int) -> ShardTask:
    return ShardTask(build="x", config=CONFIG, unit="fake-a", shard=shard)


@pytest.fixture
def book() -> TaskQueue:
    return TaskQueue.of([task(0), task(1), task(2)])


def shards(tasks: list[ShardTask]) -> list[int]:
    return [one.shard for one in tasks]


def test_tasks_are_handed_out_in_order_as_far_as_there_is_room(book: TaskQueue) -> None:
    assert shards(book.take(in_flight=0, room=2)) == [0, 1]
    assert shards(book.take(in_flight=2, room=0)) == []
    assert shards(book.take(in_flight=1, room=4)) == [2]
    assert book.is_empty


@pytest.mark.parametrize(
    ("waiting", "in_flight", "workers", "room"),
    [(100, 0, 2, 8), (100, 6, 2, 2), (100, 8, 2, 0), (8, 0, 2, 4), (3, 1, 2, 1), (1, 0, 2, 2), (9, 0, 0, 0)],
    ids=["a line for each", "topped up", "full", "few are left", "one each", "the last", "nobody there"],
)
def test_workers_get_lines_of_four_and_shorter_ones_towards_the_end(
    waiting: int, in_flight: int, workers: int, room: int
) -> None:
    book = TaskQueue.of([task(shard) for shard in range(waiting)])
    assert book.room(in_flight=in_flight, workers=workers) == room


def test_before_a_task_is_given_up_it_runs_alone(book: TaskQueue) -> None:
    zero, one, two = book.take(in_flight=0, room=3)
    book.record_worker_deaths(zero, 1, was_alone=False)
    book.record_worker_deaths(one, 1, was_alone=False)  # its neighbour, which is innocent
    assert shards(book.take(in_flight=1, room=5)) == [0, 1]
    book.record_worker_deaths(zero, 1, was_alone=False)
    assert book.take(in_flight=2, room=5) == []  # not while others run
    assert shards(book.take(in_flight=0, room=5)) == [0]
    assert not book.abandoned
    book.record_worker_deaths(zero, 1, was_alone=True)
    (abandoned,) = book.abandoned
    assert abandoned.task == zero
    assert abandoned.reason.startswith(f"{MAX_DEATHS} workers died on it")
    assert two not in book.pending


def test_a_calibration_which_takes_long_may_cost_more_workers_than_a_shard() -> None:
    book = TaskQueue.of([CALIBRATION])
    for _ in range(MAX_CALIBRATION_DEATHS):
        assert not book.abandoned
        (join,) = book.take(in_flight=0, room=1)
        book.record_worker_deaths(join, 1, was_alone=True)
    assert [one.task for one in book.abandoned] == [CALIBRATION]


def test_a_scheduler_that_counts_deaths_itself_cannot_have_an_innocent_given_up(book: TaskQueue) -> None:
    (zero,) = book.take(in_flight=0, room=1)
    book.record_worker_deaths(zero, 4, was_alone=False)
    assert not book.abandoned
    book.take(in_flight=0, room=2)
    assert shards(book.take(in_flight=0, room=1)) == [0]
    book.record_worker_deaths(zero, 4, was_alone=True)
    assert [one.task for one in book.abandoned] == [zero]


def test_what_fails_by_chance_is_tried_three_times(book: TaskQueue) -> None:
    (zero,) = book.take(in_flight=0, room=1)
    for _ in range(2):
        book.record_failure(zero, RuntimeError("CUDA out of memory\nand more"))
        book.pending.remove(zero)
    book.record_failure(zero, RuntimeError("CUDA out of memory\nand more"))
    assert [one.reason for one in book.abandoned] == ["RuntimeError: CUDA out of memory"]


def test_what_is_wrong_with_one_shard_alone_is_noted_and_the_others_go_on(book: TaskQueue) -> None:
    (zero,) = book.take(in_flight=0, room=1)
    book.record_failure(zero, CodecError("values are not finite"))
    assert [one.reason for one in book.abandoned] == ["values are not finite"]
    assert shards(book.take(in_flight=0, room=5)) == [1, 2]


@pytest.mark.parametrize("error", [ClusterError("no cache there"), StorageError("the disk is full")])
def test_what_would_go_wrong_with_every_shard_stops_the_build(book: TaskQueue, error: Exception) -> None:
    with pytest.raises(type(error)):
        book.record_failure(task(0), error)


def test_tasks_whose_fate_is_unknown_come_first_again(book: TaskQueue) -> None:
    out = book.take(in_flight=0, room=1)
    book.put_back(out)
    assert shards(book.take(in_flight=0, room=3)) == [0, 1, 2]
