"""The interface of a loaded teacher: a spec, and a call from images to features."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from radio_cache.format.schema import TeacherSpec


class Features(NamedTuple):
    """The output of a teacher for a batch of images."""

    summary: Float[Tensor, "b s"] | None
    """(b, s), one vector per image; None if the teacher has none."""

    spatial: Float[Tensor, "b h w c"]
    """(b, h, w, c), one vector per token, row-major from the top left."""


class Teacher(ABC):
    """A loaded teacher on one device. Each family is a final subclass."""

    spec: TeacherSpec  # `load_teacher_file` replaces it to add views and levels, which no family knows

    notes: tuple[str, ...] = ()
    """Messages for the user about these weights, such as an architecture that is not the published one."""

    @abstractmethod
    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Features:
        """Return the features of normalised images, in float32 or the compute dtype.

        Args:
            images: (b, 3, h, w) of the spec's input size, normalised as the spec requires.
        """
        # No caching, resizing or choice of a device in a teacher: the pipeline does all of these.

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Move the network to a device."""
