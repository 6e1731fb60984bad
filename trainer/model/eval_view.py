"""The view of a photo that a finished student takes, in evaluations and in exports.

Exported folders contain this file. It needs numpy and Pillow, and nothing else.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

StudentFit = Literal["squash", "crop"]


def prepare(
    image: Image.Image, *, image_hw: tuple[int, int], fit: StudentFit, centre_share: float = 1.0
) -> NDArray[np.float32]:
    """Turn a photo into a batch of one for a student.

    Args:
        image: of any mode. It is rotated upright by its EXIF orientation.
        image_hw: as for `eval_pixels`.
        fit: as for `eval_pixels`.
        centre_share: as for `eval_pixels`.

    Returns:
        RGB in [0, 1], shape (1, 3, height, width).
    """
    upright = ImageOps.exif_transpose(image).convert("RGB")
    pixels = eval_pixels(upright, image_hw=image_hw, fit=fit, centre_share=centre_share)
    # (h, w, 3) -> (1, 3, h, w)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32) / np.float32(255)


def eval_pixels(
    image: Image.Image, *, image_hw: tuple[int, int], fit: StudentFit, centre_share: float
) -> NDArray[np.uint8]:
    """Cut and resize an upright RGB image to the view of a student, shape (height, width, 3).

    Pillow's bicubic filter, with area averaging. "crop" resizes the shorter side and then crops the centre, with the roundings
    of torchvision's Resize and CenterCrop, which timm, open_clip and DINOv2 use: so timm's own transform gives the same pixels.

    Args:
        image: upright, RGB.
        image_hw: height and width of the view, pixels.
        fit: "squash" takes the whole image, "crop" its centre square.
        centre_share: share of the shorter side that "crop" keeps, above 0 and at most 1.
    """
    h, w = image_hw
    if fit == "squash":
        return _resized(image, (w, h))
    short_px = resized_px(image_hw, centre_share)
    if h == w:
        # torchvision's Resize of the shorter side truncates the longer one; `int` does the same.
        size = (int(short_px * image.width / min(image.size)), int(short_px * image.height / min(image.size)))
    else:  # the smallest image that covers the view
        scale = max(w / image.width, h / image.height) * short_px / min(image_hw)
        size = (max(w, round(image.width * scale)), max(h, round(image.height * scale)))
    left, top = round((size[0] - w) / 2), round((size[1] - h) / 2)
    return np.ascontiguousarray(_resized(image, size)[top : top + h, left : left + w])


def resized_px(image_hw: tuple[int, int], centre_share: float) -> int:
    """Return the shorter side, in pixels, to which "crop" resizes an image before it crops."""
    return max(min(image_hw), round(min(image_hw) / centre_share))


def _resized(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.array(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC), dtype=np.uint8)
