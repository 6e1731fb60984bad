"""Choice of the level, one of a teacher's cached input sizes, that is the target of a crop.

A teacher that runs live takes a crop at its own input size. The cached map of the whole image comes closest to this at the level
with the same magnification: as much larger than the teacher's input size as the image is larger than the crop. Rescaling the
teacher's features costs more quality than the context around the crop does (docs/results.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from radio_cache.geometry.crops import BoxXYXY, ViewGeometry, magnification, nearest_level
from radio_cache.reader import CachedTeacher
from trainer.recipes.recipe import Match

_AREA_JITTER = 0.3
"""Crops drawn for a level have its area times exp(U(-0.3, 0.3)): sides within 16 % of an exact match."""


@dataclass(frozen=True)
class Levels:
    """The levels of one teacher, smallest first, for one student resolution.

    Attributes:
        all: levels, smallest first.
        reference: number of the level whose input size is nearest to the student's.
        match: how a level is chosen for a crop (`Recipe.match`).
    """

    all: tuple[CachedTeacher, ...]
    reference: int
    match: Match

    @classmethod
    def of(cls, levels: Sequence[CachedTeacher], image_px: int, match: Match) -> "Levels":
        """Return the levels of a teacher for a student input of `image_px` pixels a side."""
        # In the logarithm: half the size is as far away as twice the size.
        distances = [abs(math.log(_size_px(level.spec.geometry) / image_px)) for level in levels]
        return cls(tuple(levels), distances.index(min(distances)), match)

    @property
    def geometry(self) -> ViewGeometry:
        """Geometry of the reference level."""
        return self.all[self.reference].spec.geometry

    def for_crop(self, box: BoxXYXY, image_hw: tuple[int, int]) -> int:
        """Return the number of the level that is the target of a crop."""
        if self.match == "off":
            return self.reference
        side = round(_size_px(self.geometry))
        return nearest_level(box, image_hw, (side, side), [level.spec.geometry for level in self.all])

    def fitting_areas(self, image_hw: tuple[int, int], least: float) -> list[float]:
        """Return the crop areas, as shares of the image, that match a level exactly; [1.0] if none is at least `least`."""
        reference = magnification(image_hw, self.geometry)
        areas = [(reference / magnification(image_hw, level.spec.geometry)) ** 2 for level in self.all]
        # 1e-6: the whole image at its own level may round to just above 1.
        return [area for area in areas if least <= area <= 1 + 1e-6] or [1.0]


def draw_area(
    rng: np.random.Generator, levels: Sequence[Levels], image_hw: tuple[int, int], crop_area: tuple[float, float]
) -> tuple[float, float]:
    """Draw a crop area, as a share of the image, that matches a level of one of the teachers up to jitter.

    Returns:
        The area twice, as the range that `random_box_xyxy` takes.
    """
    teacher = levels[int(rng.integers(len(levels)))]
    areas = teacher.fitting_areas(image_hw, crop_area[0])
    area = areas[int(rng.integers(len(areas)))] * math.exp(rng.uniform(-_AREA_JITTER, _AREA_JITTER))
    area = min(crop_area[1], max(crop_area[0], area))
    return (area, area)


def _size_px(geometry: ViewGeometry) -> float:
    return math.sqrt(math.prod(geometry.input_hw))
