"""Teachers compiled by torch.compile (`--compile`)."""

from dataclasses import replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException  # base of the errors of all compilers; it has no public name

from cache_builder.teachers.base import Features, Teacher
from cache_builder.teachers.preset import COMPILED
from radio_cache.errors import TeacherError


@final
class Compiled(Teacher):
    """A compiled teacher.

    It is compiled at its first batch, and once more, for any batch size, at the first batch of another size. Fused kernels round
    otherwise than the library's own: expect differences as between two kinds of device. The spec's `software` records it.
    """

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        # The whole call is compiled, so that the permutes around the network are fused, too.
        self._forward = torch.compile(teacher.__call__)
        self.spec = replace(teacher.spec, software=teacher.spec.software | {COMPILED: "inductor"})
        self.notes = teacher.notes

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Features:
        """Return the features of normalised images."""
        try:
            return self._forward(images)
        except TorchDynamoException as exc:
            raise TeacherError(
                f"teacher '{self.spec.name}' cannot be compiled here ({str(exc).strip().splitlines()[0]}): leave out --compile, "
                "or install a C++ compiler"
            ) from exc

    def to(self, device: torch.device) -> None:
        """Move the network to a device."""
        self._teacher.to(device)
