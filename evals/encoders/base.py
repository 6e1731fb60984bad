"""What an encoder is: something that gives one vector per image, and, if it can be run, a map of vectors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from evals.errors import EvalError
from evals.shared.image_set import ImageSet
from evals.shared.pixels import PixelBatch, pixel_batches
from radio_cache.geometry.crops import BoxXYXY, ViewGeometry

Kind = Literal["teacher", "student", "untrained", "model"]
OnImages = Callable[[int], None]
"""Told the number of images encoded since it was last told."""

OWN = "own"
"""The feature space of an encoder's own features; a student's others are its guesses at its teachers, by their names."""

BATCH_IMAGES = 64


@dataclass(frozen=True)
class Block:
    """A piece of an image set, encoded. positions (b,) in the set, ascending; summaries: feature space -> (b, c)."""

    positions: NDArray[np.int64]
    summaries: dict[str, NDArray[np.float32]]


class Outputs(NamedTuple):
    """What a model makes of a batch: feature space -> summaries (b, c), and feature space -> maps (b, h, w, c)."""

    summaries: dict[str, Float[Tensor, "b c"]]
    maps: dict[str, Float[Tensor, "b h w c"]]


class Measurable(NamedTuple):
    """A network as its speed is measured: module holds the parameters, call takes float images (b, 3, h, w) on its device."""

    module: torch.nn.Module
    call: Callable[[Tensor], object]


class Encoder(ABC):
    """Something that gives one vector per image.

    name: what tables call it. kind: what it is. about: one phrase for people.
    spaces: the feature spaces of its summaries, its own first; empty for an encoder of maps alone (SAM).
    runs_a_model: whether encoding takes time that a progress line should show.
    """

    def __init__(
        self, *, name: str, kind: Kind, about: str, spaces: tuple[str, ...], runs_a_model: bool = True
    ) -> None:
        self.name = name
        self.kind: Kind = kind
        self.about = about
        self.spaces = spaces
        self.runs_a_model = runs_a_model

    @abstractmethod
    def blocks(self, images: ImageSet, *, on_images: OnImages | None = None) -> Iterator[Block]:
        """The images in order, piece by piece, in every feature space at once; images that are left out are not there.

        Raises EvalError for an encoder without summaries.
        """

    @final
    def summaries(self, images: ImageSet, *, on_images: OnImages | None = None) -> Block:
        """All at once: where the images are few."""
        blocks = list(self.blocks(images, on_images=on_images))
        if not blocks:
            raise EvalError(f"{images.place}: none of its {len(images)} images could be read")
        return Block(
            np.concatenate([block.positions for block in blocks]),
            {space: np.concatenate([block.summaries[space] for block in blocks]) for space in self.spaces},
        )


class LiveEncoder(Encoder):
    """An encoder whose model is here and runs.

    geometry: how a whole image reaches the model, and where its tokens lie in its input; grid_hw is (1, 1) where there
    is no map. map_spaces: the feature spaces of its maps, its own first; may be empty.
    """

    geometry: ViewGeometry
    map_spaces: tuple[str, ...]

    @abstractmethod
    def pixels_of(self, image: Image.Image) -> NDArray[np.uint8]:
        """(h, w, 3): a whole image as this model sees it in evaluations, of the input size."""

    @abstractmethod
    def seen_box_xyxy(self, image_hw: tuple[int, int]) -> BoxXYXY:
        """The part of an image that the model is shown, in image pixels."""

    @abstractmethod
    def outputs(self, pixels: UInt8[Tensor, "b h w 3"], images_hw: list[tuple[int, int]] | None = None) -> Outputs:
        """Features, in float32, of pixels of the input size on any device.

        images_hw: the sizes of the images that `pixels_of` made the pixels of; None if the pixels fill the input.
        """

    @abstractmethod
    def at_size(self, size_px: int) -> "LiveEncoder":
        """The same model for square inputs of another size. Raises RadioCacheError if it cannot take that."""

    def measurable(self) -> Measurable:
        """The network alone, without heads and preprocessing. Raises EvalError for one that is not a network of torch."""
        raise EvalError(f"{self.name} is no network of torch: neither its parameters nor its speed by mode can be told")

    def blocks(self, images: ImageSet, *, on_images: OnImages | None = None) -> Iterator[Block]:
        if not self.spaces:
            raise EvalError(f"{self.name} has no summary, only maps: its images cannot be compared as wholes")
        for batch in self._batches(images, on_images):
            summaries = self._run(batch).summaries
            yield Block(batch.positions, {space: numpy_of(summaries[space]) for space in self.spaces})

    @final
    def maps(self, images: ImageSet, *, on_images: OnImages | None = None) -> Iterator[dict[str, NDArray[np.float32]]]:
        """(b, h, w, c) maps in every map space, batch by batch. Images that cannot be read are an error here."""
        if not self.map_spaces:
            raise EvalError(f"{self.name} has no maps, only a summary")
        for batch in self._batches(images, on_images):
            maps = self._run(batch).maps
            yield {space: numpy_of(maps[space]) for space in self.map_spaces}

    def _batches(self, images: ImageSet, on_images: OnImages | None) -> Iterator[PixelBatch]:
        done = 0
        for batch in pixel_batches(images, self.pixels_of, batch_images=BATCH_IMAGES):
            yield batch
            if on_images is not None:
                on_images(int(batch.positions[-1]) + 1 - done)
            done = int(batch.positions[-1]) + 1
        if on_images is not None and done < len(images):
            on_images(len(images) - done)

    def _run(self, batch: PixelBatch) -> Outputs:
        with torch.inference_mode():
            return self.outputs(torch.from_numpy(batch.pixels), batch.images_hw)


def numpy_of(features: Tensor) -> NDArray[np.float32]:
    """On the CPU, in float32."""
    return features.float().cpu().numpy()


def size_phrase(hw: tuple[int, int]) -> str:
    """How tables say an input size."""
    return f"{hw[0]} px" if hw[0] == hw[1] else f"{hw[0]} x {hw[1]} px"
