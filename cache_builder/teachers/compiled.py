"""`--compile`: a teacher whose network torch.compile has translated."""

from dataclasses import replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException  # what every compiler's errors are; there is no public name

from cache_builder.teachers.base import Features, Teacher
from cache_builder.teachers.preset import COMPILED
from radio_cache.errors import TeacherError


@final
class Compiled(Teacher):
    """Another teacher, compiled at its first images; for each new size of batch once more, the second time for any size.

    Fused kernels round otherwise than the library's own: expect differences as between two kinds of device. The spec's
    `software` says that it was compiled.
    """

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._forward = torch.compile(teacher.__call__)
        self.spec = replace(teacher.spec, software=teacher.spec.software | {COMPILED: "inductor"})
        self.notes = teacher.notes

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Features:
        try:
            return self._forward(images)
        except TorchDynamoException as exc:
            raise TeacherError(
                f"teacher '{self.spec.name}' cannot be compiled here ({str(exc).strip().splitlines()[0]}): leave out --compile, "
                "or install a C++ compiler"
            ) from exc

    def to(self, device: torch.device) -> None:
        self._teacher.to(device)
