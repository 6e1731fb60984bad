"""Real photographs that install with a package, and the way of an image to a teacher."""

from collections.abc import Callable

import pytest
import skimage.data
import torch
from PIL import Image

from cache_builder.preprocess import teacher_input, view_pixels
from cache_builder.teachers import Teacher
from radio_cache.crops import valid_hw

torch.set_num_threads(1)  # the machines that run this have few cores, and share them

PHOTOS = {
    "astronaut": (0, 0, 512, 512), "chelsea": (0, 0, 451, 300), "coffee": (0, 0, 600, 400),
    "odd": (3, 5, 340, 486), "wide": (7, 100, 508, 233), "tall": (100, 1, 201, 400), "small": (200, 90, 261, 147),
}  # fmt: skip
"""Name -> crop. The last four are odd in size, far from square, or smaller than any teacher's input."""


@pytest.fixture(scope="session", params=PHOTOS)
def photo(request: pytest.FixtureRequest) -> Image.Image:
    """Each photograph in turn."""
    return load_photo(request.param)


def load_photo(name: str) -> Image.Image:
    source = name if name in ("chelsea", "coffee") else "astronaut"
    return Image.fromarray(getattr(skimage.data, source)()).crop(PHOTOS[name])


@pytest.fixture(scope="session")
def chelsea() -> Image.Image:
    """A cat."""
    return load_photo("chelsea")


@pytest.fixture(scope="session")
def coffee() -> Image.Image:
    """A cup of espresso."""
    return load_photo("coffee")


@pytest.fixture(scope="session")
def seen_by() -> Callable[[Teacher, Image.Image], torch.Tensor]:
    """(1, 3, h, w): what a teacher receives of an image in a build."""

    def see(teacher: Teacher, image: Image.Image) -> torch.Tensor:
        geometry = teacher.spec.geometry
        pixels = torch.from_numpy(view_pixels(image, geometry).copy())[None]
        return teacher_input(pixels, [valid_hw((image.height, image.width), geometry)], teacher.spec.normalisation)

    return see
