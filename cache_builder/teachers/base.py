"""What a teacher is: a preset (data), a loader, and a call from images to features."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from radio_cache.crops import Fit
from radio_cache.schema import TeacherSpec

ComputeDtype = Literal["float32", "bfloat16", "float16"]
StateDict = Mapping[str, Tensor]


class Features(NamedTuple):
    """summary (b, c) or None where the teacher has none; spatial (b, h, w, c), row-major from the top left."""

    summary: Float[Tensor, "b s"] | None
    spatial: Float[Tensor, "b h w c"]


@dataclass(frozen=True, kw_only=True)
class WeightsSource:
    """Where published weights come from when no `--weights FILE` is given. One of the three is set.

    package: a Python package that carries the file, as module name and file below it.
    hub: a Hugging Face repository and the files to try in it, in order. url: a plain download.
    size: what the user is told to expect.
    """

    size: str
    package: tuple[str, str] | None = None
    hub: tuple[str, tuple[str, ...]] | None = None
    url: str | None = None

    def describe(self) -> str:
        """Where the file is, in words."""
        if self.package:
            return f"Python package {self.package[0].replace('_', '-')}"
        if self.hub:
            return f"huggingface.co/{self.hub[0]}, file {self.hub[1][0]}"
        return str(self.url)


@dataclass(frozen=True, kw_only=True)
class TeacherPreset:
    """A published teacher. family picks the class; model is the library's own name for the architecture."""

    name: str
    family: str
    model: str
    params: str
    licence: str
    input_px: int
    fit: Fit
    weights: WeightsSource


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """What a user may change about a teacher; None keeps the preset's value.

    weights: a file in the family's own format. size_px: side of the square input. fit: how images reach the teacher.
    codec: what goes into the spec until the codec is calibrated (`cache_builder.calibrate.wanted_codec`); empty leaves
    the choice to the build.
    """

    weights: Path | None = None
    size_px: int | None = None
    fit: Fit | None = None
    dtype: ComputeDtype = "float32"
    codec: dict[str, Any] = field(default_factory=dict[str, Any])


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
