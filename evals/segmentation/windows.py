"""Windows of images for networks of one input size: the image is resized, then cut into overlapping windows.

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
"""Stride between windows as a share of their side, as in AM-RADIO's paper (512 px, every 341)."""


@dataclass(frozen=True)
class Window:
    """A part of a resized image; it may reach beyond the frame, into padding.

    Attributes:
        position: of the image in its set.
        frame_hw: size of the resized image.
        top, left: of the window in the frame, pixels.
    """

    position: int
    frame_hw: tuple[int, int]
    top: int
    left: int


def sliding_windows(position: int, image_hw: tuple[int, int], side_px: int) -> list[Window]:
    """Return windows of side_px that cover the image, whose shorter side is resized to side_px.

    Along the longer side, a window starts every two thirds of a window; the last one is moved back to end with the image.

    Args:
        position: of the image in its set.
        image_hw: of the image, pixels.
        side_px: of the windows.
    """
    h, w = image_hw
    # The shorter side becomes side_px, the longer one keeps the aspect ratio.
    scale = side_px / min(h, w)
    frame_hw = (max(side_px, round(h * scale)), max(side_px, round(w * scale)))
    # 341 of 512 px, rounded down as in the paper.
    step = max(1, int(side_px * STRIDE_SHARE))
    starts = [_starts(length, side_px, step) for length in frame_hw]
    return [Window(position, frame_hw, top, left) for top in starts[0] for left in starts[1]]


def teacher_window(position: int, image_hw: tuple[int, int], geometry: ViewGeometry) -> Window:
    """Return the window that a teacher of a cache saw of the whole image."""
    frame_hw = resized_hw(image_hw, geometry)
    return Window(position, frame_hw, *crop_offset_yx(frame_hw, geometry))


def window_pixels(image: Image.Image, windows: Sequence[Window], side_px: int) -> NDArray[np.uint8]:
    """Return (n, side, side, 3) pixels of the sliding windows of one image; bicubic."""
    h, w = windows[0].frame_hw  # all windows of an image share its frame
    frame = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC), np.uint8)
    return np.stack(
        [frame[window.top : window.top + side_px, window.left : window.left + side_px] for window in windows]
    )


def window_classes(classes: NDArray[np.int16], window: Window, window_hw: tuple[int, int]) -> NDArray[np.int16]:
    """Return the classes of a window's pixels, by nearest neighbour from those of the image.

    Args:
        classes: (H, W) of the image.
        window: of that image.
        window_hw: of the window, frame pixels.

    Returns:
        (h, w) classes; IGNORED beyond the frame.
    """
    h, w = window.frame_hw
    ys, xs = (offset + np.arange(n) for offset, n in zip((window.top, window.left), window_hw, strict=True))
    # Centres of frame pixels, in image pixels.
    rows, columns = (
        np.clip(((offsets + 0.5) * size / frame).astype(np.int64), 0, size - 1)
        for offsets, size, frame in ((ys, classes.shape[0], h), (xs, classes.shape[1], w))
    )
    # Beyond the frame there is padding, which has no class.
    inside = ((ys >= 0) & (ys < h))[:, None] & ((xs >= 0) & (xs < w))[None, :]
    return np.where(inside, classes[rows[:, None], columns[None, :]], IGNORED).astype(np.int16)


def _starts(length: int, side: int, step: int) -> list[int]:
    """Return the starts of windows along one side of the frame."""
    if length <= side:
        return [0]
    # The last window ends with the frame and may overlap more than a third.
    return [*range(0, length - side, step), length - side]
