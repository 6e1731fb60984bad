"""Work on the device: batches of views in, features or codes out.

On a CPU every batch runs on one thread, and several batches run side by side. That keeps all cores busy without the
overhead of splitting small operations. Float32 results of the networks that were tried then depend neither on the batch size
nor on the number of cores, because only sums shared by several threads change with both (docs/log.md). On a GPU two threads
enqueue work, so that one batch is computed while the results of the other are copied back.
"""

import contextlib
import gc
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_builder.pipeline.events import IGNORED_EVENTS, BuildEvents
from cache_builder.pipeline.preprocess import teacher_input
from cache_builder.pipeline.timing import StageSeconds, Stopwatch
from cache_builder.pipeline.views import TeacherView
from cache_builder.teachers.base import Teacher
from radio_cache.codecs import Codec, Half
from radio_cache.errors import CodecError, TeacherError, UnstorableFeaturesError
from radio_cache.torch import Encoded, MapEncoder
from radio_cache.torch.memory import is_out_of_memory

_CUDA_STREAMS = 2


@dataclass(frozen=True)
class MapBatch:
    """Features of some views, on the device: spatial (b, h, w, c) in float32, and summary (b, c) or None."""

    views: Sequence[TeacherView]
    spatial: Tensor
    summary: Tensor | None


@dataclass(frozen=True)
class CodeBatch:
    """Stored form of some views' features, in main memory, and its errors.

    Attributes:
        codes: (b, *row_shape).
        summary: (b, c) or None.
        sums: (b, 2, c), sum and sum of squares over the tokens of each view.
        num_tokens: (b,), tokens of each view.
        cosines: (sum of num_tokens,), of all tokens, view by view.
        squared_errors: (b,), summed over the tokens of each view.
    """

    codes: NDArray[Any]
    summary: NDArray[np.float32] | None
    sums: NDArray[np.float64]
    num_tokens: NDArray[np.int64]
    cosines: NDArray[np.float32]
    squared_errors: NDArray[np.float64]


@contextlib.contextmanager
def device_streams(device: torch.device) -> Generator[int]:
    """Yield the number of batches to work on side by side. On a CPU, each of them gets one thread meanwhile."""
    if device.type != "cpu":
        yield _CUDA_STREAMS
        return
    # Read before it is set to one: it is the number of cores to use.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield num_threads
    finally:
        torch.set_num_threads(num_threads)


class DeviceWork:
    """Forward passes on the device, and encoding if there is a codec. Safe to call from several threads.

    A batch that does not fit into the device's memory is split, and so are all later ones.

    Args:
        teacher: the teacher, which is on the device.
        device: where to compute.
        stages: seconds by stage, which the work adds to.
        codec: codec of the maps; None if only `features` is called.
        events: receives a message when a batch is split.
    """

    def __init__(
        self,
        teacher: Teacher,
        device: torch.device,
        stages: StageSeconds,
        *,
        codec: Codec | None = None,
        events: BuildEvents = IGNORED_EVENTS,
    ) -> None:
        self._teacher, self._device, self._stages, self._events = teacher, device, stages, events
        self._dtype = getattr(torch, teacher.spec.compute_dtype)
        self._encoder = MapEncoder(codec, device) if codec else None
        # Only its check is used: the summaries themselves become half precision when they are written.
        self._summary_encoder = MapEncoder(Half(), device)
        # None until a batch did not fit.
        self._max_views: int | None = None
        self._split_lock = threading.Lock()
        # A stream of its own, so that copies do not wait for kernels of later batches.
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def features(self, views: Sequence[TeacherView]) -> list[MapBatch]:
        """Return the features of a batch, in several parts if it did not fit into memory."""
        map_batches: list[MapBatch] = []
        # Closed at once on an error: the generator may hold the lock of split batches.
        with contextlib.closing(self._attempts(views)) as attempts:
            for attempt in attempts:
                with attempt:
                    map_batches.append(self._forward(attempt.views))
        return map_batches

    def codes(self, views: Sequence[TeacherView]) -> list[CodeBatch]:
        """Return the codes of a batch, in several parts if it did not fit into memory; none for no views.

        Raises:
            UnstorableFeaturesError: the codec cannot keep a map, or half precision a summary.
        """
        code_batches: list[CodeBatch] = []
        with contextlib.closing(self._attempts(views)) as attempts:
            for attempt in attempts:
                with attempt:
                    code_batches.append(self._encode(self._forward(attempt.views)))
        return code_batches

    def _forward(self, views: Sequence[TeacherView]) -> MapBatch:
        spec = self._teacher.spec
        with Stopwatch(self._stages, "teacher"), torch.inference_mode():
            pixels = self._to_device(np.stack([view.pixels for view in views]))  # (b, h, w, 3)
            images = teacher_input(pixels, [view.valid_hw(spec.geometry) for view in views], spec.normalisation)
            with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
                out = self._teacher(images)  # (b, 3, h, w) -> (b, grid_h, grid_w, c)
            return MapBatch(views, out.spatial.float(), None if out.summary is None else out.summary.float())

    def _encode(self, maps: MapBatch) -> CodeBatch:
        assert self._encoder is not None, "this work has a codec"
        with Stopwatch(self._stages, "encode"), torch.inference_mode():
            encoded = self._encode_maps(self._encoder, maps.views, maps.spatial)
            if maps.summary is not None:
                # Only to refuse what half precision cannot keep: a summary is stored as it is. (b, c) -> (b, 1, 1, c)
                self._encode_maps(self._summary_encoder, maps.views, maps.summary[:, None, None], "summary: ")
            sums: list[Tensor] = []
            cosines: list[Tensor] = []
            errors: list[Tensor] = []
            # View by view: a sum over several views would depend on how the batch was cut.
            for number, view in enumerate(maps.views):
                mask = view.valid_tokens(self._teacher.spec.geometry)  # (grid_h, grid_w), a rectangle
                h, w = int(mask.any(axis=1).sum()), int(mask.any(axis=0).sum())
                tokens = maps.spatial[number, :h, :w].flatten(0, 1).double()  # (h, w, c) -> (h * w, c)
                sums.append(torch.stack([tokens.sum(dim=0), tokens.square().sum(dim=0)]))
                cosines.append(encoded.cosines[number, :h, :w].flatten().float())
                errors.append(encoded.squared_errors[number, :h, :w].double().sum())
            on_device = [encoded.codes, torch.stack(sums), torch.cat(cosines), torch.stack(errors), maps.summary]
            codes, moments, cosine, error, summary = self._to_host(on_device)
        num_tokens = np.array([len(view_cosines) for view_cosines in cosines], np.int64)
        assert codes is not None
        assert moments is not None
        assert cosine is not None
        assert error is not None
        return CodeBatch(codes, summary, moments, num_tokens, cosine, error)

    def _encode_maps(
        self, encoder: MapEncoder, views: Sequence[TeacherView], maps: Tensor, prefix: str = ""
    ) -> Encoded:
        """Encode maps (b, h, w, c). Raise UnstorableFeaturesError, naming the first image, if one cannot be encoded."""
        try:
            return encoder(maps)
        except CodecError:
            # The codec names no image, so the maps are tried one by one to find it.
            for view, single_map in zip(views, maps.split(1), strict=True):
                try:
                    encoder(single_map)
                except CodecError as exc:
                    raise UnstorableFeaturesError(view.row, f"{prefix}{exc}") from exc
            raise

    def _to_device(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Copy to the device without waiting for it."""
        host = torch.from_numpy(pixels)
        # Only pinned memory can be copied without waiting.
        return host if self._copy_stream is None else host.pin_memory().to(self._device, non_blocking=True)

    def _to_host(self, tensors: list[Tensor | None]) -> list[NDArray[Any] | None]:
        """Copy to main memory. On a GPU other batches are computed meanwhile, and only this thread waits."""
        if self._copy_stream is None:
            return [None if tensor is None else tensor.numpy() for tensor in tensors]
        # The copy must not begin before the results are computed.
        self._copy_stream.wait_stream(torch.cuda.current_stream(self._device))
        copies: list[Tensor | None] = []
        with torch.cuda.stream(self._copy_stream):
            for tensor in tensors:
                if tensor is None:
                    copies.append(None)
                    continue
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host.copy_(tensor, non_blocking=True)
                # Without this the allocator may reuse the memory while it is still being copied.
                tensor.record_stream(self._copy_stream)
                copies.append(host)
            copied = torch.cuda.Event()
            copied.record(self._copy_stream)
        # NumPy must not read the memory before the copy has ended.
        copied.synchronize()
        return [None if tensor is None else tensor.numpy() for tensor in copies]

    def _attempts(self, views: Sequence[TeacherView]) -> "Generator[_Attempt]":
        """Yield the parts of a batch to compute: all of it first, and smaller ones where memory did not suffice."""
        if not views:
            return
        if self._max_views is None:
            attempt = _Attempt(views)
            yield attempt
            if attempt.memory_error is None:
                return
        # One part and one thread at a time, because together they did not fit.
        with self._split_lock:
            first = 0
            while first < len(views):
                if self._max_views is None:
                    self._halve(len(views))
                attempt = _Attempt(views[first : first + (self._max_views or 1)])
                yield attempt
                if attempt.memory_error is None:
                    first += len(attempt.views)
                    continue
                if len(attempt.views) == 1:
                    raise TeacherError(
                        f"teacher '{self._teacher.spec.name}': not even one image fits into the memory of {self._device} "
                        f"({attempt.memory_error}): free some of it, or take --dtype bfloat16, a smaller --size or another "
                        "--device"
                    )
                self._halve(len(attempt.views))

    def _halve(self, num_views: int) -> None:
        self._max_views = max(1, num_views // 2)
        # Tensors of the failed pass may hang in cycles, and the allocator's cache is no use to a smaller batch.
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._events.message(
            f"{self._teacher.spec.name}: {num_views} images at once are too many for the memory of {self._device}; "
            f"going on with {self._max_views}"
        )


@final
class _Attempt:
    """A part of a batch, as a context that swallows a lack of memory and records it.

    Attributes:
        views: the views to compute.
        memory_error: first line of the error, after a block that ran out of memory. The error itself would keep the tensors
            of the failed pass alive.
    """

    def __init__(self, views: Sequence[TeacherView]) -> None:
        self.views = views
        self.memory_error: str | None = None

    def __enter__(self) -> None:
        self.memory_error = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None or not is_out_of_memory(error):
            return False
        self.memory_error = str(error).split("\n")[0]
        return True
