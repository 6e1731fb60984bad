"""What a pass of the trainer works on, as tensors: pixels of crops, stored codes, and the matrices that cut the codes."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class LevelCodes:
    """What one level of a teacher contributes, of the whole images or of one of their stored views.

    level: its number. places (k,): images of the batch that it is for. codes (k, *row_shape): as stored.
    rows (k, out_h, grid_h), columns (k, out_w, grid_w): the matrices of `radio_cache.geometry.crops.CropWeights`.
    """

    level: int
    positions: Int[Tensor, " k"]
    codes: Tensor
    rows: Float[Tensor, "k i h"]
    columns: Float[Tensor, "k j w"]


@dataclass(frozen=True)
class TeacherCodes:
    """What one teacher contributes. levels: each image is in one of them.

    valid (b, out_h, out_w): tokens that the teacher saw. kept (b,): the share of the teacher's view in the crop, over what it
    is on average. summary (b, c), or None for a teacher without.
    """

    levels: tuple[LevelCodes, ...]
    valid: Bool[Tensor, "b i j"]
    coverage: Float[Tensor, " b"]
    summary: Float[Tensor, "b c"] | None


@dataclass(frozen=True)
class Targets:
    """What a student should say under its crops: spatial (b, n, c), valid (b, n), summary (b, c) or None.

    grid_hw: of the n tokens. kept (b,): how much of what the teacher saw is in the crop, over what is on average; a summary
    speaks of all of it. shift_yx (b, 2): how many of its tokens the student's crop lies further down and right; None for not
    at all. dispersion: of the teacher's summaries, radians squared, where the loss asks for it.
    """

    spatial: Float[Tensor, "b n c"]
    valid: Bool[Tensor, "b n"]
    summary: Float[Tensor, "b c"] | None
    coverage: Float[Tensor, " b"]
    grid_hw: tuple[int, int]
    shift_yx: Int[Tensor, "b 2"] | None = None
    dispersion: float | None = None


@dataclass(frozen=True)
class Batch:
    """rows (b,): images of the cache. pixels (b, h, w, 3). teachers: in the order of the data set's; codes, or targets already.

    shift_yx (b, 2): how many of the student's tokens its crop lies further down and right than what the targets show; None
        where the recipe shifts nothing. jitter (b, 3): factors of brightness, contrast and saturation, or None.
    """

    rows: NDArray[np.int64]
    pixels: UInt8[Tensor, "b h w 3"]
    teachers: tuple[TeacherCodes | Targets, ...]
    shift_yx: Int[Tensor, "b 2"] | None = None
    jitter: Float[Tensor, "b 3"] | None = None

    def map(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with every tensor moved, to a device or into pinned memory."""

        def maybe(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else move(tensor)

        def moved(teacher: TeacherCodes | Targets) -> TeacherCodes | Targets:
            if isinstance(teacher, Targets):
                return replace(
                    teacher,
                    spatial=move(teacher.spatial),
                    valid=move(teacher.valid),
                    summary=maybe(teacher.summary),
                    coverage=move(teacher.coverage),
                    shift_yx=maybe(teacher.shift_yx),
                )
            levels = tuple(
                LevelCodes(part.level, move(part.positions), move(part.codes), move(part.rows), move(part.columns))
                for part in teacher.levels
            )
            return TeacherCodes(levels, move(teacher.valid), move(teacher.coverage), maybe(teacher.summary))

        teachers = tuple(map(moved, self.teachers))
        return replace(
            self, pixels=move(self.pixels), teachers=teachers, shift_yx=maybe(self.shift_yx), jitter=maybe(self.jitter)
        )

    def tensors(self) -> list[Tensor]:
        """All of them, to tell an allocator that a stream uses them."""
        found: list[Tensor] = []
        self.map(lambda tensor: (found.append(tensor), tensor)[1])
        return found


def student_images(batch: Batch, layout: torch.memory_format) -> Float[Tensor, "b 3 h w"]:
    """What the student sees, in [0, 1]: the batch's pixels, and their colours changed where the recipe says so.

    Brightness is a factor; contrast moves pixels from the mean grey of the image, saturation from their own grey
    (as torchvision's, in this order).
    """
    images = batch.pixels.permute(0, 3, 1, 2).to(torch.float32).div(255)
    if batch.jitter is not None:
        brightness, contrast, saturation = (factor.view(-1, 1, 1, 1) for factor in batch.jitter.unbind(1))
        images = (images * brightness).clamp(0, 1)
        mean = _grey(images).mean((1, 2, 3), keepdim=True)
        images = (mean + (images - mean) * contrast).clamp(0, 1)
        grey = _grey(images)
        images = (grey + (images - grey) * saturation).clamp(0, 1)
    return images.contiguous(memory_format=layout)


def _grey(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
    weights = images.new_tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)
