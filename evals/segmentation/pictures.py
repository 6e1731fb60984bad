"""What a probe sees, beside the truth: images under coloured classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evals.segmentation.masks import IGNORED

PICTURE_PX = 320
_OPACITY = 0.65
_NOBODY = (235, 235, 235)


@dataclass(frozen=True)
class MaskPictures:
    """One image: its key, and titled (h, w, 3) pictures of it: itself, the truth, what every probe predicts.

    iou: over the classes of this image, per probe, in the order of the pictures behind the truth.
    """

    key: str
    panes: tuple[tuple[str, NDArray[np.uint8]], ...]


def class_colours(count: int) -> NDArray[np.uint8]:
    """(count, 3): the colours of Pascal VOC's palette, in which the bits of a number are spread over red, green and blue."""
    numbers = np.arange(count)
    colours = np.zeros((count, 3), np.int64)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((numbers >> (3 * bit + channel)) & 1) << (7 - bit)
    return colours.astype(np.uint8)


def overlay(image: Image.Image, classes: NDArray[np.int16], count: int) -> NDArray[np.uint8]:
    """(h, w, 3): the image, small, tinted by class; grey where there is none."""
    scale = min(1.0, PICTURE_PX / max(image.width, image.height))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    ids = np.asarray(Image.fromarray(classes.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
    colours = np.concatenate([class_colours(count), [_NOBODY]]).astype(np.float64)
    shown = np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float64)
    mixed = (1 - _OPACITY) * shown + _OPACITY * colours[np.where(ids == IGNORED, count, ids)]
    return mixed.round().astype(np.uint8)


def thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    """(h, w, 3): the image, of the size of its overlays."""
    scale = min(1.0, PICTURE_PX / max(image.width, image.height))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.uint8)


def key_colours(names: Sequence[str]) -> list[tuple[str, str]]:
    """Class names and their colours as #rrggbb, for a legend."""
    return [
        (name, "#{:02x}{:02x}{:02x}".format(*colour))
        for name, colour in zip(names, class_colours(len(names)), strict=True)
    ]
