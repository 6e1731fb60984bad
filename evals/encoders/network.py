"""Encoders of teachers and library models: a network with its own preprocessing."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cache_builder.pipeline.preprocess import teacher_input, view_pixels
from cache_builder.teachers import TeacherOptions, load_recorded, load_teacher
from cache_builder.teachers.base import Teacher
from evals.encoders.base import OWN, Kind, LiveEncoder, Measurable, Outputs, size_phrase
from radio_cache.format.schema import Normalisation, TeacherSpec
from radio_cache.geometry.crops import BoxXYXY, ViewGeometry, valid_hw, visible_box_xyxy


class NetworkOutput(NamedTuple):
    """The summary (b, c) and the spatial map (b, h, w, c) of a batch; None if the network lacks one."""

    summary: Float[Tensor, "b s"] | None
    spatial: Float[Tensor, "b h w c"] | None


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network on a device, and how images reach it.

    Attributes:
        description: a short phrase for tables.
        geometry, normalisation: of its preprocessing.
        has_summary, has_map: which features it has.
        module: holds its parameters.
        call: maps normalised images (b, 3, h, w) of the geometry's input size to features.
        at_size: makes the same network for another square input; raises RadioCacheError if that is impossible.
    """

    description: str
    geometry: ViewGeometry
    normalisation: Normalisation
    has_summary: bool
    has_map: bool
    module: torch.nn.Module
    call: Callable[[Tensor], NetworkOutput]
    at_size: Callable[[int], "Network"]


@final
class NetworkEncoder(LiveEncoder):
    """Any network, with the preprocessing of its own library."""

    def __init__(self, network: Network, *, name: str, kind: Kind, device: torch.device) -> None:
        super().__init__(
            name=name,
            kind=kind,
            spaces=(OWN,) if network.has_summary else (),
            description=f"{network.description}, {size_phrase(network.geometry.input_hw)}",
        )
        self.geometry, self.map_spaces = network.geometry, (OWN,) if network.has_map else ()
        self._network, self._device = network, device

    def pixels_of(self, image: Image.Image) -> NDArray[np.uint8]:
        """Return the image resized as the network's library does it."""
        return view_pixels(image, self.geometry)

    def seen_box_xyxy(self, image_hw: tuple[int, int]) -> BoxXYXY:
        """Return the part of the image that the crop of the geometry leaves."""
        return visible_box_xyxy(image_hw, self.geometry)

    def outputs(self, pixels: UInt8[Tensor, "b h w 3"], images_hw: list[tuple[int, int]] | None = None) -> Outputs:
        """Run the network on normalised pixels."""
        # Padding beyond the valid size is filled after normalisation, as SAM does it.
        valid_sizes_hw = [valid_hw(hw, self.geometry) for hw in images_hw or []]
        # (b, h, w, 3) uint8 -> (b, 3, h, w) normalised, by the same code as a build.
        images = teacher_input(pixels.to(self._device), valid_sizes_hw, self._network.normalisation)
        out = self._network.call(images)
        # Half-precision outputs become float32 here, before any cosine is computed.
        summaries = {} if out.summary is None else {OWN: out.summary.float()}
        return Outputs(summaries, {} if out.spatial is None else {OWN: out.spatial.float()})

    def measurable(self) -> Measurable:
        """Return the network as its library loaded it."""
        return Measurable(self._network.module, self._network.call)

    def at_size(self, size_px: int) -> "NetworkEncoder":
        """Return the same network for another input size."""
        return NetworkEncoder(self._network.at_size(size_px), name=self.name, kind=self.kind, device=self._device)


def live_teacher(name: str, options: TeacherOptions, *, device: torch.device) -> NetworkEncoder:
    """Load a teacher by name.

    Args:
        name: of a preset.
        options: its weights and input size.
        device: where it runs.

    Raises:
        TeacherError: if the teacher cannot be loaded; the message names the cure.
    """

    def load(size_px: int | None) -> Network:
        sized = options if size_px is None else replace(options, size_px=size_px)
        # The size of a teacher is set while it is loaded, so another size is another load.
        return teacher_network(load_teacher(name, sized), device=device, at_size=load)

    return NetworkEncoder(load(options.size_px), name=name, kind="teacher", device=device)


def recorded_teacher(spec: TeacherSpec, *, device: torch.device) -> NetworkEncoder:
    """Load the teacher of a cache with the weights and geometry recorded there, in float32 whatever the build used.

    Args:
        spec: of the teacher in the cache.
        device: where it runs.

    Raises:
        TeacherError: if the recorded weights are not available, or are other ones now.
    """

    def load(size_px: int) -> Network:
        return teacher_network(load_recorded(spec, size_px=size_px), device=device, at_size=load)

    # Without a size, the recorded geometry is used exactly, so that maps match the cached ones.
    network = teacher_network(load_recorded(spec), device=device, at_size=load)
    return NetworkEncoder(network, name=spec.name, kind="teacher", device=device)


def teacher_network(teacher: Teacher, *, device: torch.device, at_size: Callable[[int], Network]) -> Network:
    """Move a loaded teacher to the device and wrap it as a network."""
    teacher.to(device)

    def call(images: Tensor) -> NetworkOutput:
        out = teacher(images)
        return NetworkOutput(out.summary, out.spatial)

    return Network(
        description="teacher, run here",
        geometry=teacher.spec.geometry,
        normalisation=teacher.spec.normalisation,
        has_summary=teacher.spec.summary_dim is not None,
        has_map=True,
        call=call,
        at_size=at_size,
        # Teachers keep their network in a private attribute of any name; a fake one of a test has none.
        module=next((part for part in vars(teacher).values() if isinstance(part, torch.nn.Module)), torch.nn.Module()),
    )
