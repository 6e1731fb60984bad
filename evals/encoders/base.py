"""The interface of encoders: one vector per image and, if the model runs here, a map of vectors."""

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
"""Called with the number of images encoded since the last call."""

OWN = "own"
"""The feature space of an encoder's own features; the others of a student are its heads, named after their teachers."""

BATCH_IMAGES = 64


@dataclass(frozen=True)
class Block:
    """An encoded piece of an image set.

    Attributes:
        positions: (b,) in the set, ascending.
        summaries: feature space -> (b, c).
    """

    positions: NDArray[np.int64]
    summaries: dict[str, NDArray[np.float32]]


class Outputs(NamedTuple):
    """The features of a batch: feature space -> summaries (b, c), and feature space -> maps (b, h, w, c)."""

    summaries: dict[str, Float[Tensor, "b c"]]
    maps: dict[str, Float[Tensor, "b h w c"]]


class Measurable(NamedTuple):
    """A network without heads and preprocessing, for timing.

    Attributes:
        module: holds the parameters.
        call: runs float images (b, 3, h, w) on the device of the module.
    """

    module: torch.nn.Module
    call: Callable[[Tensor], object]


class Encoder(ABC):
    """A source of one vector per image.

    Attributes:
        name: the name of its rows in tables.
        kind: teacher, student, untrained student or another model.
        description: a short phrase for tables.
        spaces: the feature spaces of its summaries, its own first; empty for an encoder with maps alone (SAM).
        runs_a_model: encoding takes time, so that progress is reported.
    """

    def __init__(
        self, *, name: str, kind: Kind, description: str, spaces: tuple[str, ...], runs_a_model: bool = True
    ) -> None:
        self.name = name
        self.kind: Kind = kind
        self.description = description
        self.spaces = spaces
        self.runs_a_model = runs_a_model

    @abstractmethod
    def blocks(self, images: ImageSet, *, on_images: OnImages | None = None) -> Iterator[Block]:
        """Yield the images in order, piece by piece, in every feature space at once, without images that are left out.

        Raises:
            EvalError: for an encoder without summaries.
        """

    @final
    def summaries(self, images: ImageSet, *, on_images: OnImages | None = None) -> Block:
        """Return the summaries of all images in one block, for sets that fit in memory."""
        blocks = list(self.blocks(images, on_images=on_images))
        if not blocks:
            raise EvalError(f"{images.location}: none of its {len(images)} images could be read")
        return Block(
            # Every space has the same positions: a block encodes all spaces of its images at once.
            np.concatenate([block.positions for block in blocks]),
            {space: np.concatenate([block.summaries[space] for block in blocks]) for space in self.spaces},
        )


class LiveEncoder(Encoder):
    """An encoder that runs its model.

    Attributes:
        geometry: how a whole image reaches the model, and where its tokens lie in its input; grid_hw is (1, 1) where there
            is no map.
        map_spaces: the feature spaces of its maps, its own first; may be empty.
    """

    geometry: ViewGeometry
    # A head without a summary (SAM) has a map space and no summary space.
    map_spaces: tuple[str, ...]

    @abstractmethod
    def pixels_of(self, image: Image.Image) -> NDArray[np.uint8]:
        """Return (h, w, 3): a whole image preprocessed to the input size of this model."""

    @abstractmethod
    def seen_box_xyxy(self, image_hw: tuple[int, int]) -> BoxXYXY:
        """Return the part of an image that the model sees, in image pixels."""

    @abstractmethod
    def outputs(self, pixels: UInt8[Tensor, "b h w 3"], images_hw: list[tuple[int, int]] | None = None) -> Outputs:
        """Run the model.

        Args:
            pixels: of the input size, on any device.
            images_hw: sizes of the images that `pixels_of` preprocessed; None if the pixels fill the input.

        Returns:
            Features in float32.
        """

    @abstractmethod
    def at_size(self, size_px: int) -> "LiveEncoder":
        """Return the same model for square inputs of another size.

        Raises:
            RadioCacheError: if the model does not take that size.
        """

    def measurable(self) -> Measurable:
        """Return the network without heads and preprocessing.

        Raises:
            EvalError: if the model is not a PyTorch module.
        """
        raise EvalError(f"{self.name} is not a PyTorch module: its parameters and its speed cannot be measured")

    def blocks(self, images: ImageSet, *, on_images: OnImages | None = None) -> Iterator[Block]:
        """Yield the summaries of one batch of the model after the other."""
        if not self.spaces:
            raise EvalError(f"{self.name} has no summary, only maps: its images cannot be compared as wholes")
        for batch in self._batches(images, on_images):
            # A model returns maps with its summaries; they are dropped here, batch by batch, so that they never pile up.
            summaries = self._run(batch).summaries
            yield Block(batch.positions, {space: numpy_of(summaries[space]) for space in self.spaces})

    @final
    def maps(self, images: ImageSet, *, on_images: OnImages | None = None) -> Iterator[dict[str, NDArray[np.float32]]]:
        """Yield (b, h, w, c) maps in every map space, batch by batch."""
        if not self.map_spaces:
            raise EvalError(f"{self.name} has no maps, only a summary")
        for batch in self._batches(images, on_images):
            maps = self._run(batch).maps
            yield {space: numpy_of(maps[space]) for space in self.map_spaces}

    def _batches(self, images: ImageSet, on_images: OnImages | None) -> Iterator[PixelBatch]:
        num_done = 0
        for batch in pixel_batches(images, self.pixels_of, batch_images=BATCH_IMAGES):
            yield batch
            # Counted by position, so that images left out between two batches count as done.
            if on_images is not None:
                on_images(int(batch.positions[-1]) + 1 - num_done)
            num_done = int(batch.positions[-1]) + 1
        if on_images is not None and num_done < len(images):
            on_images(len(images) - num_done)

    def _run(self, batch: PixelBatch) -> Outputs:
        # Inference mode, not no_grad: it also skips the version counters of tensors.
        with torch.inference_mode():
            return self.outputs(torch.from_numpy(batch.pixels), batch.images_hw)


def numpy_of(features: Tensor) -> NDArray[np.float32]:
    """Return the features as float32 on the CPU."""
    # NumPy has no bfloat16, so the conversion comes before the copy.
    return features.float().cpu().numpy()


def size_phrase(hw: tuple[int, int]) -> str:
    """Return an input size as tables print it: "224 px", or "224 x 448 px"."""
    return f"{hw[0]} px" if hw[0] == hw[1] else f"{hw[0]} x {hw[1]} px"
