"""What the stages of a build cost without a build: in one process for each core, all at once, nothing shared but the machine."""

import multiprocessing
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier

import torch

from cache_builder.pipeline.device import DeviceWork
from cache_builder.pipeline.image_access import ImageAccess
from cache_builder.pipeline.timing import StageSeconds
from cache_builder.pipeline.views import load_views
from cache_builder.teachers import TeacherOptions, load_teacher
from cache_builder.workers.allocator import keep_freed_memory
from radio_cache.reader import Cache


@contextmanager
def stages_apart(cache: Cache, name: str, batch_images: int, processes: int) -> Generator[Callable[[], float]]:
    """Processes that wait to decode, compute and encode all images of a cache among them, each its share; they end with the
    block. What is given has them do it once, and returns the wall seconds until the last one was done."""
    context = multiprocessing.get_context("spawn")
    go, seconds = context.Barrier(processes + 1), context.Queue()
    started = [
        context.Process(target=_work, args=(cache.url, name, batch_images, number, processes, go, seconds), daemon=True)
        for number in range(processes)
    ]
    for process in started:
        process.start()

    def once() -> float:
        go.wait()
        return max(seconds.get() for _ in started)

    try:
        yield once
    finally:
        for process in started:
            process.terminate()
            process.join()


def _work(
    url: str, name: str, batch_images: int, number: int, processes: int, go: Barrier, seconds: "Queue[float]"
) -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    cache = Cache(url)
    teacher = load_teacher(name, TeacherOptions())
    work = DeviceWork(teacher, torch.device("cpu"), StageSeconds(), codec=cache.teachers[name].codec)
    rows = cache.usable_rows().tolist()[number::processes]

    access = ImageAccess(cache)

    def batch(first: int) -> None:
        work.codes(
            [
                one
                for row in rows[first : first + batch_images]
                for one in load_views(cache, access, teacher.spec, (row, (0,)))
            ]
        )

    batch(0)
    while True:
        go.wait()
        started = time.perf_counter()
        for first in range(0, len(rows), batch_images):
            batch(first)
        seconds.put(time.perf_counter() - started)
