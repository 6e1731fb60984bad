"""From a cache to batches: pixels of fresh random crops, and what samples each teacher's map under them.

The order of images and every crop are pure functions of (seed, step): threads change the speed, never the data, and a
resumed run sees what an uninterrupted one would have seen.
"""

import functools
import math
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from radio_cache.crops import BoxXYXY, CropWeights, crop_weights, intersect_xyxy, random_box_xyxy, visible_box_xyxy
from radio_cache.errors import ConfigError, ImageError, TrainingError
from radio_cache.images import decode_image
from radio_cache.prefetch import ahead
from radio_cache.reader import Cache, CachedTeacher
from trainer.recipes import Recipe

StudentFit = Literal["squash", "crop"]

_ORDER, _CROPS = 0, 1
"""Streams of random numbers drawn from one seed."""

_CENTRE_SHARE = 0.875
"""What the centre crop of an evaluation keeps of the shorter side, as most teachers' own preprocessing does."""


def student_pixels(image: Image.Image, image_hw: tuple[int, int], box_xyxy: BoxXYXY | None = None) -> NDArray[np.uint8]:
    """A student's view: the box of the image (all of it by default), resized to `image_hw`; (h, w, 3) uint8.

    Bicubic with area averaging, from the exact, fractional box, so that pixels and targets are cut at the same place.
    """
    h, w = image_hw
    return np.array(image.resize((w, h), Image.Resampling.BICUBIC, box=box_xyxy), dtype=np.uint8)


def eval_box_xyxy(image_hw: tuple[int, int], fit: StudentFit) -> BoxXYXY | None:
    """What a student is shown of an image outside of training: all of it, or the centre square its teachers saw."""
    if fit == "squash":
        return None
    h, w = image_hw
    half = _CENTRE_SHARE * min(h, w) / 2
    return (w / 2 - half, h / 2 - half, w / 2 + half, h / 2 + half)


def shifted_box_xyxy(
    rng: np.random.Generator, box: BoxXYXY, within: BoxXYXY, grid_hw: tuple[int, int], std_tokens: float
) -> tuple[BoxXYXY, tuple[int, int]]:
    """A box moved by whole tokens of a grid laid over it, and by how many (down, right): round(N(0, std_tokens)) each.

    A move that would leave `within`, or half the overlap or more, is not made along that axis.
    Source: C-RADIOv4, arXiv 2601.17237, where the deviation is 0.5.
    """
    x0, y0, x1, y1 = box
    moves: list[int] = []
    for size, low, high, tokens, least, most in (
        (y1 - y0, y0, y1, grid_hw[0], within[1], within[3]),
        (x1 - x0, x0, x1, grid_hw[1], within[0], within[2]),
    ):
        move = round(rng.normal(0.0, std_tokens))
        by = move * size / tokens
        moves.append(move if low + by >= least and high + by <= most and 2 * abs(move) < tokens else 0)
    down, right = moves[0] * (y1 - y0) / grid_hw[0], moves[1] * (x1 - x0) / grid_hw[1]
    return (x0 + right, y0 + down, x1 + right, y1 + down), (moves[0], moves[1])


@dataclass(frozen=True)
class TeacherBatch:
    """What one teacher contributes to a batch, on the CPU. codes (b, h, w, c) as stored; summary (b, c) or None."""

    codes: NDArray[Any]
    weights: CropWeights
    summary: NDArray[np.float32] | None


@dataclass(frozen=True)
class Batch:
    """step: which one. rows (b,): images of the cache. pixels (b, h, w, 3) uint8. teachers: in the data set's order.

    shift_yx (b, 2): how many of the student's tokens its crop lies further down and right than what the targets show;
        None where the recipe shifts nothing.
    """

    step: int
    rows: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    teachers: tuple[TeacherBatch, ...]
    shift_yx: NDArray[np.int64] | None


class CropData:
    """The training images of a cache with the teachers named, as batches by step.

    grid_hw: the student's tokens. Raises ConfigError if the cache lacks a teacher or has no usable image.
    """

    def __init__(self, cache: Cache, teachers: tuple[str, ...], recipe: Recipe, grid_hw: tuple[int, int]) -> None:
        self.cache, self.recipe, self.grid_hw = cache, recipe, grid_hw
        self.teachers: tuple[CachedTeacher, ...] = tuple(cache.teachers[name] for name in teachers)
        self.rows = cache.usable_rows(teachers)
        if len(self.rows) == 0:
            raise ConfigError(
                f"{cache.url} has no image that is complete for {', '.join(teachers)}: run the build to its end"
            )

        self.target_hw = tuple(self._target_hw(teacher.spec.geometry.grid_hw) for teacher in self.teachers)
        self._order = functools.lru_cache(maxsize=2)(self._permutation)

    def rows_of(self, step: int) -> NDArray[np.int64]:
        """Rows of a step. Every image comes once an epoch, in a new order; an epoch may begin inside a batch."""
        count, size = len(self.rows), self.recipe.batch_images
        positions = np.arange(step * size, (step + 1) * size)
        return np.array([self.rows[self._order(int(p) // count)[int(p) % count]] for p in positions])

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng((self.recipe.seed, _ORDER, epoch)).permutation(len(self.rows))

    def batch(self, step: int) -> Batch:
        """The batch of a step. Raises TrainingError naming an image that cannot be read any more."""
        rows = self.rows_of(step)
        rng = np.random.default_rng((self.recipe.seed, _CROPS, step))
        geometries = [teacher.spec.geometry for teacher in self.teachers]
        side = self.recipe.image_px
        sizes: list[tuple[int, int]] = []
        boxes: list[BoxXYXY] = []
        shifts = np.zeros((len(rows), 2), np.int64)
        shifting = self.recipe.shift_tokens > 0
        pixels = np.empty((len(rows), side, side, 3), np.uint8)
        for number, row in enumerate(rows):
            image = self._image(int(row))
            hw = (image.height, image.width)
            seen = intersect_xyxy([visible_box_xyxy(hw, geometry) for geometry in geometries])
            box = random_box_xyxy(rng, seen, area=self.recipe.crop_area, ratio=self.recipe.crop_ratio)
            shown = box
            if shifting:
                shown, shifts[number] = shifted_box_xyxy(rng, box, seen, self.grid_hw, self.recipe.shift_tokens)
            pixels[number] = student_pixels(image, (side, side), shown)
            sizes.append(hw)
            boxes.append(box)
        parts = tuple(
            TeacherBatch(
                teacher.codes(rows),
                crop_weights(boxes, sizes, teacher.spec.geometry, out_hw=target_hw),
                None if teacher.spec.summary_dim is None else teacher.summaries(rows),
            )
            for teacher, target_hw in zip(self.teachers, self.target_hw, strict=True)
        )
        return Batch(step, rows, pixels, parts, shifts if shifting else None)

    def _target_hw(self, teacher_hw: tuple[int, int]) -> tuple[int, int]:
        """The grid on which a teacher's map and its head's meet: the head's, or the larger of the two."""
        head_hw = (self.grid_hw[0] * self.recipe.adaptor_upsample, self.grid_hw[1] * self.recipe.adaptor_upsample)
        if self.recipe.target_grid == "student":
            return head_hw
        share = math.sqrt(self.recipe.crop_area[1])
        h, w = (max(mine, math.ceil(theirs * share)) for mine, theirs in zip(head_hw, teacher_hw, strict=True))
        return (h, w)

    def batches(self, first: int, last: int, *, threads: int) -> Generator[Batch]:
        """Batches of steps first to last - 1, made ahead in threads."""
        with ThreadPoolExecutor(threads, thread_name_prefix="data") as pool:
            yield from ahead(pool, self.batch, range(first, last), depth=threads + 2)

    def _image(self, row: int) -> Image.Image:
        try:
            return decode_image(self.cache.read_file(row), max_pixels=self.cache.meta.max_pixels)
        except ImageError as exc:
            raise TrainingError(f"image {self.cache.index.key(row)} of {self.cache.url}: {exc}") from exc
