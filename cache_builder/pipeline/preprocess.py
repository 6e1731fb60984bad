"""From an upright RGB image to what a teacher receives, operation by operation as the teacher's own library does it."""

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
    """The whole image as a teacher sees it: resized with PIL, then cut or padded; (h, w, 3), padding 0.

    Bitwise what torchvision's Resize and CenterCrop (CLIP, timm) and SAM's ResizeLongestSide make of a PIL image.
    Raises ImageError for an image too long and thin to resize.
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
    pixels: UInt8[Tensor, "b h w 3"], valid: list[tuple[int, int]], normalisation: Normalisation
) -> Float[Tensor, "b 3 h w"]:
    """Normalised float32 input on the pixels' device. Padding is zero after normalisation, as in SAM.

    valid: height and width of the part of each input that shows the image, from the top left.
    """
    mean, std = (
        pixels.new_tensor(v, dtype=torch.float32).view(1, 3, 1, 1) for v in (normalisation.mean, normalisation.std)
    )
    images = pixels.permute(0, 3, 1, 2).to(torch.float32)
    images = images.div(normalisation.scale).sub(mean).div(std)
    for number, (h, w) in enumerate(valid):
        images[number, :, h:] = 0
        images[number, :, :, w:] = 0
    return images.contiguous()
