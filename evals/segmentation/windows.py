"""How a whole image is shown to a network of one input size: resized, then cut into windows that overlap.

Frames. *Image pixels* of the upright image; *frame pixels* of the resized one, in which windows lie.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evals.segmentation.masks import IGNORED
from radio_cache.geometry.crops import ViewGeometry, crop_offset_yx, resized_hw

STRIDE_SHARE = 2 / 3
"""Of a window's side from one window to the next, as in AM-RADIO's paper (512 px, every 341)."""


@dataclass(frozen=True)
class Window:
    """A part of one image, frame_hw large before it was cut; it may reach beyond the frame, where there is padding.

    position: of the image. top, left: of the window in the frame, pixels.
    """

    position: int
    frame_hw: tuple[int, int]
    top: int
    left: int


def sliding_windows(position: int, image_hw: tuple[int, int], side_px: int) -> list[Window]:
    """Windows of side_px that cover the image, whose shorter side is resized to side_px.

    Along the longer side they start every two thirds of a window; the last one is moved back to end with the image.
    """
    h, w = image_hw
    scale = side_px / min(h, w)
    frame_hw = (max(side_px, round(h * scale)), max(side_px, round(w * scale)))
    step = max(1, int(side_px * STRIDE_SHARE))
    starts = [_starts(length, side_px, step) for length in frame_hw]
    return [Window(position, frame_hw, top, left) for top in starts[0] for left in starts[1]]


def teacher_window(position: int, image_hw: tuple[int, int], geometry: ViewGeometry) -> Window:
    """The one window that a teacher of a cache was shown of the whole image."""
    frame_hw = resized_hw(image_hw, geometry)
    return Window(position, frame_hw, *crop_offset_yx(frame_hw, geometry))


def window_pixels(image: Image.Image, windows: Sequence[Window], side_px: int) -> NDArray[np.uint8]:
    """(n, side, side, 3) pixels of sliding windows of one image, which have one frame; bicubic."""
    h, w = windows[0].frame_hw
    frame = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC), np.uint8)
    return np.stack([frame[one.top : one.top + side_px, one.left : one.left + side_px] for one in windows])


def window_classes(classes: NDArray[np.int16], window: Window, window_hw: tuple[int, int]) -> NDArray[np.int16]:
    """(h, w) classes of a window's pixels, from those of the image by nearest neighbour; IGNORED beyond the frame."""
    h, w = window.frame_hw
    ys, xs = (offset + np.arange(n) for offset, n in zip((window.top, window.left), window_hw, strict=True))
    rows, columns = (
        np.clip(((at + 0.5) * size / frame).astype(np.int64), 0, size - 1)
        for at, size, frame in ((ys, classes.shape[0], h), (xs, classes.shape[1], w))
    )
    inside = ((ys >= 0) & (ys < h))[:, None] & ((xs >= 0) & (xs < w))[None, :]
    return np.where(inside, classes[rows[:, None], columns[None, :]], IGNORED).astype(np.int16)


def _starts(length: int, side: int, step: int) -> list[int]:
    if length <= side:
        return [0]
    return [*range(0, length - side, step), length - side]
