"""Parts shared by drop-ins: a student that takes a library's images and returns one teacher's features."""

import copy
from collections.abc import Sequence
from typing import TypeVar, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from radio_cache.errors import ConfigError, unknown_name
from trainer.model.adaptors import BACKBONE, AdaptorOutput, TeacherWidths
from trainer.model.student import DistilledStudent
from trainer.students import StudentOutput

_Model = TypeVar("_Model", bound=nn.Module)


@final
class StudentAsTeacher(nn.Module):
    """One teacher's features from images standardised as that teacher's library does it.

    Args:
        teacher: a head's name, or "backbone" for the student's own features.
        mean: per-channel mean that the library subtracts from pixels in [0, 1].
        std: the same.
        image_hw: input size of the student, in pixels; None keeps the size of the images, or takes the nearest size that the
            student accepts.

    Raises:
        ConfigError: for a teacher without a head, or a size that the student does not accept.
    """

    def __init__(
        self,
        model: DistilledStudent,
        teacher: str,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        image_hw: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        widths(model, teacher)
        if image_hw is not None and model.nearest_supported_resolution(*image_hw) != image_hw:
            h, w = model.nearest_supported_resolution(*image_hw)
            raise ConfigError(
                f"student '{model.config.student}' does not take {image_hw[0]} x {image_hw[1]} pixels; {h} x {w} is the nearest"
            )
        self.student, self.teacher, self.image_hw = model.eval(), teacher, image_hw
        # Its images are standardised and perhaps resized, which overshoots: a wrong range cannot be detected from them.
        model.student.range_checked = True
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> StudentOutput | AdaptorOutput:
        """Return the summary (b, c), or None for a teacher without one, and a map (b, d, h, w)."""
        # Back to [0, 1], which students take.
        pixels = images * self.std + self.mean
        h, w = int(images.shape[-2]), int(images.shape[-1])
        input_hw = self.student.nearest_supported_resolution(h, w) if self.image_hw is None else self.image_hw
        if input_hw != (h, w):
            pixels = F.interpolate(pixels, input_hw, mode="bicubic", antialias=True, align_corners=False)
        # The backbone and one head are called by themselves: `forward` would run the heads that are in use.
        features = self.student.student(pixels)
        grid_hw = self.student.grid_hw(pixels)
        if self.teacher == BACKBONE:
            # (b, n, c) -> (b, c, h, w)
            return StudentOutput(features.summary, features.spatial.transpose(1, 2).unflatten(2, grid_hw))
        # (b, n, d) -> (b, d, h, w), on the head's own grid
        output = self.student.adaptors(features, grid_hw, [self.teacher])[self.teacher]
        fine_hw = grid_hw[0] * self.student.adaptors.upsample, grid_hw[1] * self.student.adaptors.upsample
        return AdaptorOutput(output.summary, output.spatial.transpose(1, 2).unflatten(2, fine_hw))


def widths(model: DistilledStudent, teacher: str) -> TeacherWidths:
    """Return the widths of a teacher's features, or those of the student itself for "backbone"."""
    if teacher == BACKBONE:
        return TeacherWidths(name=BACKBONE, summary_dim=model.summary_dim, spatial_dim=model.embed_dim)
    known = {teacher_widths.name: teacher_widths for teacher_widths in model.config.teachers}
    if teacher not in known:
        raise ConfigError(unknown_name("adaptor of this student", teacher, [*known, BACKBONE]))
    return known[teacher]


def with_part(model: _Model, name: str, part: nn.Module) -> _Model:
    """Return a copy of the model with one submodule replaced. All other submodules and weights are shared."""
    other = copy.copy(model)
    other._modules = dict(model._modules)  # pyright: ignore[reportPrivateUsage]  # without a copy the part would replace that of the original, too
    setattr(other, name, part)
    return other
