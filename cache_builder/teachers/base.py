"""What a loaded teacher is: a spec, and a call from images to features."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from radio_cache.format.schema import TeacherSpec


class Features(NamedTuple):
    """summary (b, c) or None where the teacher has none; spatial (b, h, w, c), row-major from the top left."""

    summary: Float[Tensor, "b s"] | None
    spatial: Float[Tensor, "b h w c"]


class Teacher(ABC):
    """A loaded teacher on one device. Final subclasses are the families."""

    spec: TeacherSpec
    notes: tuple[str, ...] = ()
    """Sentences a user should see about these weights, such as an architecture that is not the published one."""

    @abstractmethod
    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Features:
        """Features of normalised images of the spec's input size, in float32 or the compute dtype."""

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Move the network to a device."""
