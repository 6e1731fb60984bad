"""Which of a teacher's input sizes is the target of a crop, and crops that a size fits.

A teacher that runs live sees a crop at its own input size. The cached map of the whole image is most like that where the image
was seen at the same magnification: from a level as much larger than the teacher's size as the image is larger than the crop.
What hurts is rescaling what the teacher saw, more than what it saw around (docs/results.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from radio_cache.geometry.crops import BoxXYXY, ViewGeometry, magnification, nearest_level
from radio_cache.reader import CachedTeacher
from trainer.recipes.recipe import Match

_AREA_JITTER = 0.3
"""Crops that are drawn for a level have its area times exp(U(-0.3, 0.3)): sides within 16 % of an exact match."""


@dataclass(frozen=True)
class Levels:
    """One teacher's levels, smallest first, as one student resolution sees them.

    reference: the level whose size is nearest to the student's: what the teacher itself would see of a crop.
    """

    all: tuple[CachedTeacher, ...]
    reference: int
    match: Match

    @classmethod
    def of(cls, levels: Sequence[CachedTeacher], image_px: int, match: Match) -> "Levels":
        distances = [abs(math.log(_size_px(level.spec.geometry) / image_px)) for level in levels]
        return cls(tuple(levels), distances.index(min(distances)), match)

    @property
    def geometry(self) -> ViewGeometry:
        """Of the reference."""
        return self.all[self.reference].spec.geometry

    def for_crop(self, box: BoxXYXY, image_hw: tuple[int, int]) -> int:
        """The level that a crop is compared with."""
        if self.match == "off":
            return self.reference
        side = round(_size_px(self.geometry))
        return nearest_level(box, image_hw, (side, side), [level.spec.geometry for level in self.all])

    def fitting_areas(self, image_hw: tuple[int, int], least: float) -> list[float]:
        """Shares of the image, at least `least` but for the whole of it, at which one of the levels fits exactly."""
        mine = magnification(image_hw, self.geometry)
        areas = [(mine / magnification(image_hw, level.spec.geometry)) ** 2 for level in self.all]
        return [area for area in areas if least <= area <= 1 + 1e-6] or [1.0]


def draw_area(
    rng: np.random.Generator, levels: Sequence[Levels], image_hw: tuple[int, int], crop_area: tuple[float, float]
) -> tuple[float, float]:
    """A range for `random_box_xyxy` that is one value: the share at which a level of one of the teachers fits, jittered."""
    teacher = levels[int(rng.integers(len(levels)))]
    areas = teacher.fitting_areas(image_hw, crop_area[0])
    area = areas[int(rng.integers(len(areas)))] * math.exp(rng.uniform(-_AREA_JITTER, _AREA_JITTER))
    area = min(crop_area[1], max(crop_area[0], area))
    return (area, area)


def _size_px(geometry: ViewGeometry) -> float:
    return math.sqrt(math.prod(geometry.input_hw))
