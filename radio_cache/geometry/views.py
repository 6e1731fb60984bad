"""Extra views: seeded random crops of an image on which a teacher ran in addition to the whole image.

A view is an image of its own: its box is cropped, perhaps mirrored, and goes through the teacher's geometry like any
image. So its map is sampled with `crops.crop_weights`, after `box_in_view` has moved the student's crop into the view's frame.
View 0 is the whole image. The boxes are stored with the arrays, so readers need not draw them again.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from radio_cache.errors import ConfigError
from radio_cache.geometry.crops import BoxXYXY, random_box_xyxy


@dataclass(frozen=True, kw_only=True)
class ViewSampling:
    """The parameters of random views.

    Attributes:
        seed: of the draws.
        area: range of the share of the image.
        ratio: range of the aspect ratio, relative to the image's own.
        flip_share: share of mirrored views.
    """

    seed: int
    area: tuple[float, float]
    ratio: tuple[float, float]
    flip_share: float

    def __post_init__(self) -> None:
        ordered = 0 < self.area[0] <= self.area[1] <= 1 and 0 < self.ratio[0] <= self.ratio[1]
        if not ordered or not 0 <= self.flip_share <= 1 or self.seed < 0:
            raise ConfigError(f"no views can be drawn this way: {self}")


class View(NamedTuple):
    """The part of an image in a view: whole pixels, x1 and y1 exclusive.

    Attributes:
        box_xyxy: of the image, pixels.
        flipped: whether it is mirrored left to right.
    """

    box_xyxy: tuple[int, int, int, int]
    flipped: bool

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the view, an image of its own, in pixels."""
        x0, y0, x1, y1 = self.box_xyxy
        return (y1 - y0, x1 - x0)


def whole_view(image_hw: tuple[int, int]) -> View:
    """View 0 of an image."""
    return View((0, 0, image_hw[1], image_hw[0]), flipped=False)


def draw_view(sampling: ViewSampling | None, row: int, number: int, image_hw: tuple[int, int]) -> View:
    """View `number` of the image in a row of a cache: a function of these and the seed alone, the same for all teachers."""
    if number == 0:
        return whole_view(image_hw)
    if sampling is None:
        raise ConfigError(f"view {number} is asked for, and how views are drawn is not said")
    # No teacher in the seed: all teachers see the same crop.
    rng = np.random.default_rng((sampling.seed, row, number))
    h, w = image_hw
    x0, y0, x1, y1 = random_box_xyxy(rng, (0.0, 0.0, float(w), float(h)), area=sampling.area, ratio=sampling.ratio)
    # To whole pixels, because a teacher sees pixels: the nearest ones, at least one, inside the image.
    left, top = min(round(x0), w - 1), min(round(y0), h - 1)
    box = (left, top, min(w, max(left + 1, round(x1))), min(h, max(top + 1, round(y1))))
    return View(box, flipped=bool(rng.uniform() < sampling.flip_share))


def box_in_view(box_xyxy_px: BoxXYXY, view: View) -> BoxXYXY:
    """Return a box of the image in the frame of a view of it, which may be mirrored. It may extend beyond the view."""
    x0, y0, x1, y1 = box_xyxy_px
    left, top, right, _ = view.box_xyxy
    if view.flipped:
        # Mirrored: the right edge becomes the left one.
        return (right - x1, y0 - top, right - x0, y1 - top)
    return (x0 - left, y0 - top, x1 - left, y1 - top)
