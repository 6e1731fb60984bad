"""The tensors of one forward pass: pixels of crops with their colour augmentation, stored codes, and matrices that crop them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class LevelCodes:
    """Stored codes of one level of a teacher, of whole images or of one of their stored views.

    Attributes:
        level: number of the level.
        positions: (k,) positions in the batch of the images that the codes are of.
        codes: (k, *row_shape) codes as stored.
        rows: (k, out_h, grid_h) row matrices of `radio_cache.geometry.crops.CropWeights`.
        columns: (k, out_w, grid_w) column matrices.
    """

    level: int
    positions: Int[Tensor, " k"]
    codes: Tensor
    rows: Float[Tensor, "k i h"]
    columns: Float[Tensor, "k j w"]


@dataclass(frozen=True)
class TeacherCodes:
    """Stored codes of one teacher for a batch of b images.

    Attributes:
        levels: codes by level; each image is in exactly one of them.
        valid: (b, out_h, out_w) whether the teacher's view covers the token.
        coverage: (b,) share of the teacher's view that the crop covers, divided by its mean over the run.
        summary: (b, c) summaries, or None for a teacher without.
    """

    levels: tuple[LevelCodes, ...]
    valid: Bool[Tensor, "b i j"]
    coverage: Float[Tensor, " b"]
    summary: Float[Tensor, "b c"] | None


@dataclass(frozen=True)
class Targets:
    """The targets of one teacher for a batch: its features under the student's crops.

    Attributes:
        spatial: (b, n, c) tokens, row-major from the top left.
        valid: (b, n) whether a token counts.
        summary: (b, c), or None.
        coverage: (b,) share of the teacher's view that the crop covers, divided by its mean over the run. A summary describes
            the whole view, so its loss counts by this.
        grid_hw: height and width of the n tokens.
        shift_yx: (b, 2) offset (down, right) of the student's crop in tokens, or None for no offset.
        dispersion: of the teacher's summaries, in radians squared, where the loss needs it.
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
    """The inputs of one forward pass.

    Attributes:
        rows: (b,) rows of the cache.
        pixels: (b, h, w, 3) crops.
        teachers: one entry for each teacher of the data set, in its order: stored codes, or targets made from them ahead.
        shift_yx: (b, 2) offset (down, right) of the student's crop from the targets' in the student's tokens, or None.
        jitter: (b, 3) factors of brightness, contrast and saturation, or None.
    """

    rows: NDArray[np.int64]
    pixels: UInt8[Tensor, "b h w 3"]
    teachers: tuple[TeacherCodes | Targets, ...]
    shift_yx: Int[Tensor, "b 2"] | None = None
    jitter: Float[Tensor, "b 3"] | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch with `function` applied to every tensor, such as a copy to a device or into pinned memory."""

        def map_optional(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else function(tensor)

        def map_teacher(teacher: TeacherCodes | Targets) -> TeacherCodes | Targets:
            if isinstance(teacher, Targets):
                return replace(
                    teacher,
                    spatial=function(teacher.spatial),
                    valid=function(teacher.valid),
                    summary=map_optional(teacher.summary),
                    coverage=function(teacher.coverage),
                    shift_yx=map_optional(teacher.shift_yx),
                )
            levels = tuple(
                LevelCodes(
                    level.level,
                    function(level.positions),
                    function(level.codes),
                    function(level.rows),
                    function(level.columns),
                )
                for level in teacher.levels
            )
            return TeacherCodes(
                levels, function(teacher.valid), function(teacher.coverage), map_optional(teacher.summary)
            )

        return replace(
            self,
            pixels=function(self.pixels),
            teachers=tuple(map(map_teacher, self.teachers)),
            shift_yx=map_optional(self.shift_yx),
            jitter=map_optional(self.jitter),
        )

    def tensors(self) -> list[Tensor]:
        """Return all tensors, for `Tensor.record_stream`."""
        tensors: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        self.map(collect)
        return tensors


def student_images(batch: Batch, layout: torch.memory_format) -> Float[Tensor, "b 3 h w"]:
    """Return the student's input in [0, 1], with colour jitter where the recipe has it.

    Brightness is a factor. Contrast scales around the mean grey of the image, saturation around each pixel's own grey.

    Source: torchvision's `adjust_brightness`, `adjust_contrast` and `adjust_saturation`, in this order.
    """
    # (b, h, w, 3) uint8 -> (b, 3, h, w) in [0, 1]
    images = batch.pixels.permute(0, 3, 1, 2).to(torch.float32).div(255)
    if batch.jitter is not None:
        # (b, 3) -> three factors (b, 1, 1, 1)
        brightness, contrast, saturation = (factor.view(-1, 1, 1, 1) for factor in batch.jitter.unbind(1))
        images = (images * brightness).clamp(0, 1)
        mean = _grey(images).mean((1, 2, 3), keepdim=True)  # (b, 1, 1, 1)
        images = (mean + (images - mean) * contrast).clamp(0, 1)
        grey = _grey(images)  # (b, 1, h, w)
        images = (grey + (images - grey) * saturation).clamp(0, 1)
    return images.contiguous(memory_format=layout)


def _grey(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
    # ITU-R 601 luma, with torchvision's rounding of the coefficients.
    weights = images.new_tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)
