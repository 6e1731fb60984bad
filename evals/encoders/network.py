"""Teachers and models of libraries as encoders: all are a network with its own preprocessing."""

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
    """summary (b, c) and spatial (b, h, w, c); None for what the network does not have."""

    summary: Float[Tensor, "b s"] | None
    spatial: Float[Tensor, "b h w c"] | None


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network on a device and how images reach it.

    module: what holds its parameters.
    call: normalised images (b, 3, h, w) of the geometry's input size -> features. has_summary, has_map: which.
    at_size: the same for another size of square input; raises RadioCacheError if there is no such thing.
    """

    about: str
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
            about=f"{network.about}, {size_phrase(network.geometry.input_hw)}",
        )
        self.geometry, self.map_spaces = network.geometry, (OWN,) if network.has_map else ()
        self._network, self._device = network, device

    def pixels_of(self, image: Image.Image) -> NDArray[np.uint8]:
        return view_pixels(image, self.geometry)

    def seen_box_xyxy(self, image_hw: tuple[int, int]) -> BoxXYXY:
        return visible_box_xyxy(image_hw, self.geometry)

    def outputs(self, pixels: UInt8[Tensor, "b h w 3"], images_hw: list[tuple[int, int]] | None = None) -> Outputs:
        shown = [valid_hw(hw, self.geometry) for hw in images_hw or []]
        images = teacher_input(pixels.to(self._device), shown, self._network.normalisation)
        out = self._network.call(images)
        summaries = {} if out.summary is None else {OWN: out.summary.float()}
        return Outputs(summaries, {} if out.spatial is None else {OWN: out.spatial.float()})

    def measurable(self) -> Measurable:
        return Measurable(self._network.module, self._network.call)

    def at_size(self, size_px: int) -> "NetworkEncoder":
        return NetworkEncoder(self._network.at_size(size_px), name=self.name, kind=self.kind, device=self._device)


def live_teacher(name: str, options: TeacherOptions, *, device: torch.device) -> NetworkEncoder:
    """A teacher as a model that runs. Raises TeacherError with the cure if it cannot be had."""

    def load(size_px: int | None) -> Network:
        sized = options if size_px is None else replace(options, size_px=size_px)
        return teacher_network(load_teacher(name, sized), device=device, at_size=load)

    return NetworkEncoder(load(options.size_px), name=name, kind="teacher", device=device)


def recorded_teacher(spec: TeacherSpec, *, device: torch.device) -> NetworkEncoder:
    """The teacher of a cache, with the weights and geometry recorded there, in float32 whatever the build used."""

    def load(size_px: int) -> Network:
        return teacher_network(load_recorded(spec, size_px=size_px), device=device, at_size=load)

    network = teacher_network(load_recorded(spec), device=device, at_size=load)
    return NetworkEncoder(network, name=spec.name, kind="teacher", device=device)


def teacher_network(teacher: Teacher, *, device: torch.device, at_size: Callable[[int], Network]) -> Network:
    """A loaded teacher, moved to the device."""
    teacher.to(device)

    def call(images: Tensor) -> NetworkOutput:
        out = teacher(images)
        return NetworkOutput(out.summary, out.spatial)

    return Network(
        about="teacher, run here",
        geometry=teacher.spec.geometry,
        normalisation=teacher.spec.normalisation,
        has_summary=teacher.spec.summary_dim is not None,
        has_map=True,
        call=call,
        at_size=at_size,
        module=next((part for part in vars(teacher).values() if isinstance(part, torch.nn.Module)), torch.nn.Module()),
    )
