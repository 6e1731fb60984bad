"""The data loader: threads prepare pixels and codes side by side, in reused buffers, ahead of the step.

The copy to a GPU overlaps with the step before.

On a CPU, where loader and trainer share the processor and nothing is copied, the thread that reads codes also makes the targets.
The trainer's waiting time is recorded by cause: *pixels* or *codes*, whichever was ready last, and *transfer*, the copy to the
device.
"""

import contextlib
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radio_cache.prefetch.buffers import BufferRing
from trainer.data.batch import Batch, Targets, TeacherCodes
from trainer.data.crops import CodeReader, CropData, Crops, make_batch, read_codes
from trainer.data.schedule import BatchSlice, Schedule
from trainer.data.waits import Waits

GroupKey = tuple[int, int]
"""Stage and group of a recipe."""


class LoadedBatch(NamedTuple):
    """The batch of one pass on the device, and the time that the trainer waited for it."""

    batch_slice: BatchSlice
    batch: Batch
    waits: Waits


@dataclass(frozen=True)
class _Pass:
    batch_slice: BatchSlice
    data: CropData

    @functools.cached_property
    def crops(self) -> Crops:
        """The crops of the pass, drawn once for both threads that need them."""
        return self.data.crops(self.batch_slice.number, self.batch_slice.first, self.batch_slice.last)


MakeTargets = Callable[[TeacherCodes, Tensor | None], Targets]
"""A function such as `trainer.objective.targets.TargetMaker`: from a teacher's codes and the student's shift to targets."""


class _Prepared(NamedTuple):
    """The pixels or the teachers' inputs of a pass, and the time at which they were ready (`time.perf_counter`)."""

    work: _Pass
    content: Any
    ready: float


class _Passes:
    """The passes of a run, for two rings that iterate over them at their own pace and share the drawn crops."""

    def __init__(self, schedule: Schedule, groups: Mapping[GroupKey, CropData], first: int, last: int) -> None:
        self._batch_slices = lambda: itertools.chain.from_iterable(
            schedule.batch_slices(step) for step in range(first, last)
        )
        self._groups = groups
        # Passes that one of the two rings has taken, until the other takes them, too.
        self._taken_once: dict[int, _Pass] = {}
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[_Pass]:
        for number, batch_slice in enumerate(self._batch_slices()):
            with self._lock:
                work = self._taken_once.pop(number, None)
                if work is None:
                    data = self._groups[batch_slice.stage, batch_slice.group]
                    work = self._taken_once[number] = _Pass(batch_slice, data)
            yield work


@dataclass
class _Buffers:
    """Buffers of one slot of a ring, allocated when a group first needs them; those of earlier stages are freed."""

    pin: bool
    arrays: dict[tuple[GroupKey, str], list[NDArray[Any]]] = field(
        default_factory=dict[tuple[GroupKey, str], list[Any]]
    )

    def get(self, batch_slice: BatchSlice, name: str, allocate: Callable[[], list[NDArray[Any]]]) -> list[NDArray[Any]]:
        """Return the buffers of a group by name, after `allocate` at their first use."""
        key = ((batch_slice.stage, batch_slice.group), name)
        if key not in self.arrays:
            # Stages come one after the other, so that buffers of earlier ones are not needed again.
            self.arrays = {old: arrays for old, arrays in self.arrays.items() if old[0][0] == batch_slice.stage}
            self.arrays[key] = [_pin_memory(array) for array in allocate()] if self.pin else allocate()
        return self.arrays[key]


class BatchLoader:
    """The batches of steps [first, last) of one process, in order. A context manager.

    An error in a thread is raised in place of its batch.

    Args:
        schedule: passes of this process in every step.
        groups: data of every stage's groups.
        first: first step.
        last: end of the steps, exclusive.
        device: device that batches are copied to.
        threads: threads that decode pixels; one or two more read codes.
        read: reader of codes.
        targets: makers of the teachers' targets, if these are made ahead; otherwise batches hold codes.
    """

    def __init__(
        self,
        schedule: Schedule,
        groups: Mapping[GroupKey, CropData],
        first: int,
        last: int,
        *,
        device: torch.device,
        threads: int,
        read: CodeReader = read_codes,
        targets: Mapping[str, MakeTargets] | None = None,
    ) -> None:
        self._device, self._read, self._targets = device, read, targets
        pin = device.type == "cuda"
        passes = _Passes(schedule, groups, first, last)
        keep = 3 if pin else 1  # a copy may still run from the buffers of the batch before and of the one ahead
        # Reading codes takes less time than decoding pixels.
        buffers = functools.partial(_Buffers, pin)
        readers = 1 if threads < 4 else 2
        self._pixels = BufferRing[_Pass, _Buffers, _Prepared](
            passes, self._fill_pixels, buffers, depth=threads + 1, threads=threads, keep=keep
        )
        self._codes = BufferRing[_Pass, _Buffers, _Prepared](
            passes, self._fill_codes, buffers, depth=threads + 1, threads=readers, keep=keep
        )

    def __enter__(self) -> "BatchLoader":
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(self._pixels)
        self._stack.enter_context(self._codes)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[LoadedBatch]:
        match self._device.type:
            case "cpu":
                return iter(self._next, None)  # already on the device
            case "cuda":
                return self._on_gpu()
            case _:
                return self._copied()

    def _copied(self) -> Iterator[LoadedBatch]:
        while (loaded := self._next()) is not None:
            started = time.perf_counter()
            batch = loaded.batch.map(lambda tensor: tensor.to(self._device))
            loaded.waits.transfer = time.perf_counter() - started
            yield loaded._replace(batch=batch)

    def _on_gpu(self) -> Iterator[LoadedBatch]:
        """Yield batches with one copy always in flight.

        The time that the device waited for a copy is known one step later, and counts for that step.
        """
        stream = torch.cuda.Stream(self._device)
        stalls: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        upload = self._upload(stream)
        while upload is not None:
            loaded, copied = upload
            compute = torch.cuda.current_stream(self._device)
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record(compute)
            compute.wait_event(copied)
            after.record(compute)
            stalls.append((before, after))
            # The allocator must not reuse the memory while the compute stream reads it.
            for tensor in loaded.batch.tensors():
                tensor.record_stream(compute)
            upload = self._upload(stream)
            while stalls and stalls[0][1].query():
                start, end = stalls.pop(0)
                loaded.waits.transfer += start.elapsed_time(end) / 1e3
            yield loaded

    def _upload(self, stream: torch.cuda.Stream) -> tuple[LoadedBatch, torch.cuda.Event] | None:
        loaded = self._next()
        if loaded is None:
            return None
        with torch.cuda.stream(stream):
            batch = loaded.batch.map(lambda tensor: tensor.to(self._device, non_blocking=True))
            copied = torch.cuda.Event()
            copied.record(stream)
        return loaded._replace(batch=batch), copied

    def _next(self) -> LoadedBatch | None:
        started = time.perf_counter()
        codes, pixels = next(self._codes, None), next(self._pixels, None)
        waited = time.perf_counter() - started
        if codes is None or pixels is None:
            return None
        # The one that was ready last is the one that was waited for.
        waits = Waits(codes=waited) if codes.ready > pixels.ready else Waits(pixels=waited)
        batch = make_batch(codes.work.crops, pixels.content, codes.content)
        return LoadedBatch(codes.work.batch_slice, batch, waits)

    def _fill_pixels(self, work: _Pass, buffers: _Buffers) -> _Prepared:
        num_images, side = len(work.crops.rows), work.data.image_px
        [out] = buffers.get(work.batch_slice, "", lambda: [np.empty((num_images, side, side, 3), np.uint8)])
        work.data.read_pixels(work.crops, out)
        return _Prepared(work, torch.from_numpy(out), time.perf_counter())

    def _fill_codes(self, work: _Pass, buffers: _Buffers) -> _Prepared:
        num_images = len(work.crops.rows)
        teachers: list[TeacherCodes | Targets] = []
        shift_yx = work.data.head_shift_yx(work.crops.shift_yx) if self._targets else None
        for name in work.data.levels:
            out = buffers.get(work.batch_slice, name, lambda name=name: work.data.code_buffers(name, num_images))
            codes = work.data.read_teacher(name, work.crops, self._read, out)
            # Without makers of targets, the step makes them from the codes.
            teachers.append(self._targets[name](codes, shift_yx) if self._targets else codes)
        return _Prepared(work, tuple(teachers), time.perf_counter())


def _pin_memory(array: NDArray[Any]) -> NDArray[Any]:
    """Return a page-locked copy of an array, from which copies to a GPU run beside the processor."""
    return torch.from_numpy(array).pin_memory().numpy()
