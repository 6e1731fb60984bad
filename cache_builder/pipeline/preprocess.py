"""Preprocessing: from an upright RGB image to a teacher's input, operation by operation as the teacher's library does it."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from radio_cache.format.schema import Normalisation
from radio_cache.geometry.crops import ViewGeometry, crop_offset_yx, resized_hw

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def view_pixels(image: Image.Image, geometry: ViewGeometry) -> NDArray[np.uint8]:
    """Return an image resized with PIL, then cut or padded with 0, to the teacher's input size: (h, w, 3).

    The result is bitwise that of torchvision's Resize and CenterCrop (CLIP, timm) and of SAM's ResizeLongestSide on a PIL
    image.

    Raises:
        ImageError: the image is too long and thin to resize.
    """
    image_hw = (image.height, image.width)
    h, w = resized_hw(image_hw, geometry)
    resized = image if (h, w) == image_hw else image.resize((w, h), _RESAMPLING[geometry.interpolation])
    pixels = np.asarray(resized, dtype=np.uint8)
    if geometry.fit == "crop":
        top, left = crop_offset_yx((h, w), geometry)
        return pixels[top : top + geometry.input_hw[0], left : left + geometry.input_hw[1]]
    if geometry.fit == "pad":
        canvas = np.zeros((*geometry.input_hw, 3), dtype=np.uint8)
        canvas[:h, :w] = pixels
        return canvas
    return pixels


def teacher_input(
    pixels: UInt8[Tensor, "b h w 3"], valid_hw: list[tuple[int, int]], normalisation: Normalisation
) -> Float[Tensor, "b 3 h w"]:
    """Return the normalised float32 input, on the device of the pixels.

    Args:
        pixels: views as uint8.
        valid_hw: height and width, in pixels, of the part of each view that shows the image, from the top left.
        normalisation: scale, mean and standard deviation.
    """
    mean, std = (
        pixels.new_tensor(values, dtype=torch.float32).view(1, 3, 1, 1)
        for values in (normalisation.mean, normalisation.std)
    )
    images = pixels.permute(0, 3, 1, 2).to(torch.float32)  # (b, h, w, 3) -> (b, 3, h, w)
    images = images.div(normalisation.scale).sub(mean).div(std)
    # Padding is zero after normalisation, as in SAM, not before it.
    for number, (h, w) in enumerate(valid_hw):
        images[number, :, h:] = 0
        images[number, :, :, w:] = 0
    return images.contiguous()
