"""What a teacher receives, apart from the parity with each family's library, which its own test checks."""

import numpy as np
import pytest
import torch
from PIL import Image

from cache_builder.pipeline.preprocess import teacher_input, view_pixels
from radio_cache.errors import ImageError
from radio_cache.format.schema import IMAGENET_PIXELS, Normalisation
from radio_cache.geometry.crops import Fit, patch_geometry


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_pixels_have_the_input_size_whatever_the_image(fit: Fit, photo: Image.Image) -> None:
    pixels = view_pixels(photo, patch_geometry(56, 14, fit=fit, interpolation="bicubic"))
    assert pixels.shape == (56, 56, 3)
    assert pixels.dtype == np.uint8


def test_padding_is_black_before_and_zero_after_normalisation() -> None:
    geometry = patch_geometry(32, 8, fit="pad", interpolation="bilinear")
    pixels = view_pixels(Image.new("RGB", (40, 20), "white"), geometry)
    assert (pixels[:16] == 255).all()
    assert (pixels[16:] == 0).all()
    images = teacher_input(torch.from_numpy(pixels)[None], [(16, 32)], IMAGENET_PIXELS)
    assert (images[..., 16:, :] == 0).all()
    assert (images[..., :16, :] > 2).all()


def test_normalisation_divides_by_the_scale_first() -> None:
    pixels = torch.tensor([[[[51, 102, 204]]]], dtype=torch.uint8)
    normalisation = Normalisation(scale=255.0, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    out = teacher_input(pixels, [(1, 1)], normalisation)
    assert out.shape == (1, 3, 1, 1)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.2, 0.2, 0.25]))


def test_a_strip_that_would_fill_the_memory_is_an_image_error() -> None:
    with pytest.raises(ImageError, match="too long and thin"):
        view_pixels(Image.new("RGB", (60_000, 2)), patch_geometry(224, 16, fit="crop", interpolation="bicubic"))
