"""Batches ahead of their use: pixels and codes are made side by side in threads, in buffers that are used again and again,
and the copy to a GPU runs beside the step before.

On a CPU, where reader and trainer share the processor and nothing is copied, the thread that reads codes makes targets of them,
too. The trainer's waiting is told by cause: *pixels* or *codes*, whichever came last, and *transfer*, the copy to the device.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radio_cache.prefetch.buffers import Ring
from trainer.data.batch import Batch, Targets, TeacherCodes
from trainer.data.crops import CodeReader, CropData, Crops, make_batch, read_codes
from trainer.data.schedule import BatchSlice, Schedule
from trainer.data.waits import Waits

GroupKey = tuple[int, int]
"""Stage and group of a recipe."""


class LoadedBatch(NamedTuple):
    """A pass's batch on the device, and what the trainer waited for it."""

    part: BatchSlice
    batch: Batch
    waits: Waits


@dataclass(frozen=True)
class _Pass:
    part: BatchSlice
    data: CropData

    @functools.cached_property
    def crops(self) -> Crops:
        return self.data.crops(self.part.number, self.part.first, self.part.last)


MakeTargets = Callable[[TeacherCodes, Tensor | None], Targets]
"""What a `trainer.objective.targets.TargetMaker` is: from a teacher's part of a batch, and the student's shift, to targets."""


class _Read(NamedTuple):
    """What a thread made of a pass, and when it was ready (`time.perf_counter`)."""

    one: _Pass
    made: Any
    ready: float


class _Passes:
    """The passes of a run, handed to two rings that go through them at their own pace; crops are drawn once."""

    def __init__(self, schedule: Schedule, groups: Mapping[GroupKey, CropData], first: int, last: int) -> None:
        self._parts = lambda: (part for step in range(first, last) for part in schedule.batch_slices(step))
        self._groups = groups
        self._half_taken: dict[int, _Pass] = {}
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[_Pass]:
        for number, part in enumerate(self._parts()):
            with self._lock:
                one = self._half_taken.pop(number, None)
                if one is None:
                    one = self._half_taken[number] = _Pass(part, self._groups[part.stage, part.group])
            yield one


@dataclass
class _Buffers:
    """Memory of one place in a ring, made when a group first needs it; that of earlier stages is given back."""

    pin: bool
    made: dict[tuple[GroupKey, str], list[NDArray[Any]]] = field(default_factory=dict[tuple[GroupKey, str], list[Any]])

    def get(self, part: BatchSlice, name: str, make: Callable[[], list[NDArray[Any]]]) -> list[NDArray[Any]]:
        key = ((part.stage, part.group), name)
        if key not in self.made:
            self.made = {old: arrays for old, arrays in self.made.items() if old[0][0] == part.stage}
            self.made[key] = [_pinned(array) for array in make()] if self.pin else make()
        return self.made[key]


class BatchLoader:
    """The batches of steps [first, last) of one process, in order. A context manager.

    groups: of every stage, what its groups see. threads: that decode pixels; one or two more read codes. read: how codes
    come from the cache. targets: of every teacher, made ahead where given; else batches hold codes.
    After an error of a thread, it is raised where its batch would have come.
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
        buffers = functools.partial(_Buffers, pin)
        readers = 1 if threads < 4 else 2
        self._pixels = Ring[_Pass, _Buffers, _Read](
            passes, self._fill_pixels, buffers, depth=threads + 1, threads=threads, keep=keep
        )
        self._codes = Ring[_Pass, _Buffers, _Read](
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
                return iter(self._next, None)  # where they are made, nothing is copied
            case "cuda":
                return self._on_gpu()
            case _:
                return self._copied()

    def _copied(self) -> Iterator[LoadedBatch]:
        while (fed := self._next()) is not None:
            started = time.perf_counter()
            batch = fed.batch.map(lambda tensor: tensor.to(self._device))
            fed.waits.transfer = time.perf_counter() - started
            yield fed._replace(batch=batch)

    def _on_gpu(self) -> Iterator[LoadedBatch]:
        """One batch is always on its way. What the device itself waited for a copy is known a step later, and told then."""
        stream = torch.cuda.Stream(self._device)
        stalled: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        coming = self._upload(stream)
        while coming is not None:
            fed, copied = coming
            compute = torch.cuda.current_stream(self._device)
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record(compute)
            compute.wait_event(copied)
            after.record(compute)
            stalled.append((before, after))
            for tensor in fed.batch.tensors():
                tensor.record_stream(compute)
            coming = self._upload(stream)
            while stalled and stalled[0][1].query():
                start, end = stalled.pop(0)
                fed.waits.transfer += start.elapsed_time(end) / 1e3
            yield fed

    def _upload(self, stream: torch.cuda.Stream) -> tuple[LoadedBatch, torch.cuda.Event] | None:
        fed = self._next()
        if fed is None:
            return None
        with torch.cuda.stream(stream):
            fed = fed._replace(batch=fed.batch.map(lambda tensor: tensor.to(self._device, non_blocking=True)))
            copied = torch.cuda.Event()
            copied.record(stream)
        return fed, copied

    def _next(self) -> LoadedBatch | None:
        started = time.perf_counter()
        codes, pixels = next(self._codes, None), next(self._pixels, None)
        waited = time.perf_counter() - started
        if codes is None or pixels is None:
            return None
        waits = Waits(codes=waited) if codes.ready > pixels.ready else Waits(pixels=waited)
        return LoadedBatch(codes.one.part, make_batch(codes.one.crops, pixels.made, codes.made), waits)

    def _fill_pixels(self, one: _Pass, buffers: _Buffers) -> _Read:
        side = one.data.image_px
        [out] = buffers.get(one.part, "", lambda: [np.empty((len(one.crops.rows), side, side, 3), np.uint8)])
        one.data.read_pixels(one.crops, out)
        return _Read(one, torch.from_numpy(out), time.perf_counter())

    def _fill_codes(self, one: _Pass, buffers: _Buffers) -> _Read:
        images = len(one.crops.rows)
        parts: list[TeacherCodes | Targets] = []
        shift_yx = one.data.head_shift_yx(one.crops.shift_yx) if self._targets else None
        for name in one.data.levels:
            out = buffers.get(one.part, name, lambda name=name: one.data.code_buffers(name, images))
            part = one.data.read_teacher(name, one.crops, self._read, out)
            parts.append(self._targets[name](part, shift_yx) if self._targets else part)
        return _Read(one, tuple(parts), time.perf_counter())


def _pinned(array: NDArray[Any]) -> NDArray[Any]:
    """The same memory where copies to a GPU need not wait for the processor."""
    return torch.from_numpy(array).pin_memory().numpy()
