"""Predictions of probes beside the truth: images tinted by class."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evals.segmentation.masks import IGNORED

PICTURE_PX = 320
# Strong enough to tell 21 colours apart, with the outlines of the image still visible.
_OPACITY = 0.65
_UNLABELLED_COLOUR = (235, 235, 235)


@dataclass(frozen=True)
class MaskPictures:
    """The pictures of one image.

    Attributes:
        key: of the image.
        panes: titled (h, w, 3) pictures: the image, the truth, the prediction of every probe.
    """

    key: str
    panes: tuple[tuple[str, NDArray[np.uint8]], ...]


def class_colours(count: int) -> NDArray[np.uint8]:
    """Return (count, 3) colours of Pascal VOC's palette, which spreads the bits of a number over red, green and blue."""
    numbers = np.arange(count)
    colours = np.zeros((count, 3), np.int64)
    # Bits 0, 3, 6 of the number go to red, 1, 4, 7 to green, and so on, highest colour bit first.
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((numbers >> (3 * bit + channel)) & 1) << (7 - bit)
    return colours.astype(np.uint8)


def overlay(image: Image.Image, classes: NDArray[np.int16], count: int) -> NDArray[np.uint8]:
    """Return (h, w, 3): the image, made small, tinted by class; grey for unlabelled pixels."""
    scale = min(1.0, PICTURE_PX / max(image.width, image.height))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Nearest neighbour: a mean of two class numbers would be a third class.
    ids = np.asarray(Image.fromarray(classes.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
    colours = np.concatenate([class_colours(count), [_UNLABELLED_COLOUR]]).astype(np.float64)
    # Index `count` of the palette is the colour of unlabelled pixels.
    small = np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float64)
    mixed = (1 - _OPACITY) * small + _OPACITY * colours[np.where(ids == IGNORED, count, ids)]
    return mixed.round().astype(np.uint8)


def thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    """Return (h, w, 3): the image at the size of its overlays."""
    scale = min(1.0, PICTURE_PX / max(image.width, image.height))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.uint8)


def key_colours(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return class names and their colours as #rrggbb, for a legend."""
    return [
        (name, "#{:02x}{:02x}{:02x}".format(*colour))
        for name, colour in zip(names, class_colours(len(names)), strict=True)
    ]
