"""What happens on the device: batches of images in, features or codes out.

On a CPU every batch runs on one thread, and several batches run side by side. That keeps all cores busy without the
overhead of splitting small operations, and float32 results of the networks we tried are the same whatever the batch size
and the number of cores: what changes with both are sums that several threads share (docs/log.md). On a GPU two threads hand
out work, so that one batch is being computed while the other's results are fetched.
"""

import gc
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_builder.pipeline.preprocess import teacher_input
from cache_builder.pipeline.timing import StageSeconds, Stopwatch
from cache_builder.pipeline.views import TeacherView
from cache_builder.teachers.base import Teacher
from radio_cache.codecs import Codec, Half
from radio_cache.errors import CodecError, TeacherError, UnstorableFeaturesError
from radio_cache.torch import Encoded, MapEncoder
from radio_cache.torch.memory import is_out_of_memory

T = TypeVar("T")

_CUDA_STREAMS = 2


@dataclass(frozen=True)
class MapBatch:
    """Features of some images, on the device: spatial (b, h, w, c) in float32; summary (b, c) or None."""

    shown: Sequence[TeacherView]
    spatial: Tensor
    summary: Tensor | None


@dataclass(frozen=True)
class CodeBatch:
    """What is stored of some images, in main memory, and what it cost.

    codes (b, *row_shape); summary (b, c) or None; sums (b, 2, c): sum and sum of squares over an image's tokens, of which
    there are num_tokens (b,); cosines: of all tokens, image by image; squared_errors (b,).
    """

    codes: NDArray[Any]
    summary: NDArray[np.float32] | None
    sums: NDArray[np.float64]
    num_tokens: NDArray[np.int64]
    cosines: NDArray[np.float32]
    squared_errors: NDArray[np.float64]


@contextmanager
def device_streams(device: torch.device) -> Generator[int]:
    """How many batches to work on side by side. On a CPU, each gets one thread meanwhile."""
    if device.type != "cpu":
        yield _CUDA_STREAMS
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


class DeviceWork:
    """Forward passes, and encoding with a codec if one is given, on the device. Safe to call from several threads.

    A batch that does not fit into the device's memory is split, and so are all that come after it.
    say: told when that happens.
    """

    def __init__(
        self,
        teacher: Teacher,
        device: torch.device,
        stages: StageSeconds,
        *,
        codec: Codec | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._teacher, self._device, self._stages, self._say = teacher, device, stages, say
        self._dtype = getattr(torch, teacher.spec.compute_dtype)
        self._encoder = MapEncoder(codec, device) if codec else None
        self._summary_encoder = MapEncoder(Half(), device)
        self._most: int | None = None
        self._turn = threading.Lock()
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def features(self, batch: Sequence[TeacherView]) -> list[MapBatch]:
        """Features of a batch; in several parts where it did not fit."""
        return self._fitting(batch, self._forward)

    def codes(self, batch: Sequence[TeacherView]) -> list[CodeBatch]:
        """Codes of a batch; in several parts where it did not fit. Raises UnstorableFeaturesError, for maps that the codec and
        summaries that half precision cannot keep."""
        return self._fitting(batch, self._encoded)

    def _forward(self, batch: Sequence[TeacherView]) -> MapBatch:
        spec = self._teacher.spec
        with Stopwatch(self._stages, "teacher"), torch.inference_mode():
            pixels = self._there(np.stack([one.pixels for one in batch]))
            images = teacher_input(pixels, [one.valid_hw(spec.geometry) for one in batch], spec.normalisation)
            with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
                out = self._teacher(images)
            return MapBatch(batch, out.spatial.float(), None if out.summary is None else out.summary.float())

    def _encoded(self, batch: Sequence[TeacherView]) -> CodeBatch:
        assert self._encoder is not None, "this work has a codec"
        maps = self._forward(batch)
        with Stopwatch(self._stages, "encode"), torch.inference_mode():
            encoded = self.process_state(self._encoder, batch, maps.spatial)
            if maps.summary is not None:
                self.process_state(self._summary_encoder, batch, maps.summary[:, None, None], "summary: ")
            sums: list[Tensor] = []
            cosines: list[Tensor] = []
            errors: list[Tensor] = []
            # Image by image: what is summed together must not depend on the batch.
            for number, one in enumerate(batch):
                mask = one.valid_tokens(self._teacher.spec.geometry)
                h, w = int(mask.any(axis=1).sum()), int(mask.any(axis=0).sum())
                tokens = maps.spatial[number, :h, :w].flatten(0, 1).double()
                sums.append(torch.stack([tokens.sum(dim=0), tokens.square().sum(dim=0)]))
                cosines.append(encoded.cosines[number, :h, :w].flatten().float())
                errors.append(encoded.squared_errors[number, :h, :w].double().sum())
            here = self._here([encoded.codes, torch.stack(sums), torch.cat(cosines), torch.stack(errors), maps.summary])
        codes, moments, cosine, error, summary = here
        num_tokens = np.array([len(one) for one in cosines], np.int64)
        assert codes is not None
        assert moments is not None
        assert cosine is not None
        assert error is not None
        return CodeBatch(codes, summary, moments, num_tokens, cosine, error)

    def process_state(self, encoder: MapEncoder, batch: Sequence[TeacherView], maps: Tensor, what: str = "") -> Encoded:
        """Encode maps (b, h, w, c). Raises UnstorableFeaturesError naming the first image that cannot be."""
        try:
            return encoder(maps)
        except CodecError:
            for one, own in zip(batch, maps.split(1), strict=True):
                try:
                    encoder(own)
                except CodecError as exc:
                    raise UnstorableFeaturesError(one.row, f"{what}{exc}") from exc
            raise

    def _there(self, pixels: NDArray[np.uint8]) -> Tensor:
        """On the device, without waiting."""
        host = torch.from_numpy(pixels)
        return host if self._copies is None else host.pin_memory().to(self._device, non_blocking=True)

    def _here(self, tensors: list[Tensor | None]) -> list[NDArray[Any] | None]:
        """In main memory. On a GPU beside the computing of other batches, and only this thread waits."""
        if self._copies is None:
            return [None if tensor is None else tensor.numpy() for tensor in tensors]
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        found: list[Tensor | None] = []
        with torch.cuda.stream(self._copies):
            for tensor in tensors:
                if tensor is None:
                    found.append(None)
                    continue
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host.copy_(tensor, non_blocking=True)
                tensor.record_stream(self._copies)
                found.append(host)
            done = torch.cuda.Event()
            done.record(self._copies)
        done.synchronize()
        return [None if tensor is None else tensor.numpy() for tensor in found]

    def _fitting(self, batch: Sequence[TeacherView], work: Callable[[Sequence[TeacherView]], T]) -> list[T]:
        most = self._most
        if most is None:
            try:
                return [work(batch)]
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as exc:
                if not is_out_of_memory(exc):
                    raise
        # Here, not where it was caught: the exception holds on to the tensors of the failed pass.
        return self._in_parts(batch, work)

    def _in_parts(self, batch: Sequence[TeacherView], work: Callable[[Sequence[TeacherView]], T]) -> list[T]:
        """One part at a time, and one thread at a time: together they did not fit."""
        done: list[T] = []
        first = 0
        with self._turn:
            while first < len(batch):
                if self._most is None:
                    self._fewer(len(batch))
                part = batch[first : first + (self._most or 1)]
                full: str | None = None
                try:
                    done.append(work(part))
                    first += len(part)
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as exc:
                    if not is_out_of_memory(exc):
                        raise
                    full = str(exc).split("\n")[0]
                if full is not None:
                    if len(part) == 1:
                        raise TeacherError(
                            f"teacher '{self._teacher.spec.name}': not even one image fits into the memory of {self._device} "
                            f"({full}): free some of it, or take --dtype bfloat16, a smaller --size or another --device"
                        )
                    self._fewer(len(part))
        return done

    def _fewer(self, images: int) -> None:
        self._most = max(1, images // 2)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._say(
            f"{self._teacher.spec.name}: {images} images at once are too many for the memory of {self._device}; "
            f"going on with {self._most}"
        )
