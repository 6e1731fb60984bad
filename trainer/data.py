"""From a cache to batches: pixels of fresh random crops, and what samples each teacher's map under them.

The order of images and every crop are pure functions of (seed, step): threads change the speed, never the data, and a
resumed run sees what an uninterrupted one would have seen.
"""

import functools
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from radio_cache.crops import BoxXYXY, CropWeights, crop_weights, intersect_xyxy, random_box_xyxy, visible_box_xyxy
from radio_cache.errors import ConfigError, ImageError, TrainingError
from radio_cache.images import decode_image
from radio_cache.prefetch import ahead
from radio_cache.reader import Cache, CachedTeacher
from radio_cache.torch import MapDecoder, crop_maps
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


@dataclass(frozen=True)
class TeacherBatch:
    """What one teacher contributes to a batch, on the CPU. codes (b, h, w, c) as stored; summary (b, c) or None."""

    codes: NDArray[Any]
    weights: CropWeights
    summary: NDArray[np.float32] | None


@dataclass(frozen=True)
class Batch:
    """step: which one. rows (b,): images of the cache. pixels (b, h, w, 3) uint8. teachers: in the data set's order."""

    step: int
    rows: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    teachers: tuple[TeacherBatch, ...]


@dataclass(frozen=True)
class Targets:
    """What a student should say under its crops, on the device: spatial (b, n, c), valid (b, n), summary (b, c) or None.

    kept (b,): the share of what the teacher saw that the crop kept; a summary speaks of all of it.
    """

    spatial: Float[Tensor, "b n c"]
    valid: Bool[Tensor, "b n"]
    summary: Float[Tensor, "b c"] | None
    kept: Float[Tensor, " b"]


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
        pixels = np.empty((len(rows), side, side, 3), np.uint8)
        for number, row in enumerate(rows):
            image = self._image(int(row))
            hw = (image.height, image.width)
            seen = intersect_xyxy([visible_box_xyxy(hw, geometry) for geometry in geometries])
            box = random_box_xyxy(rng, seen, area=self.recipe.crop_area, ratio=self.recipe.crop_ratio)
            pixels[number] = student_pixels(image, (side, side), box)
            sizes.append(hw)
            boxes.append(box)
        parts = tuple(
            TeacherBatch(
                teacher.codes(rows),
                crop_weights(boxes, sizes, teacher.spec.geometry, out_hw=self.grid_hw),
                None if teacher.spec.summary_dim is None else teacher.summaries(rows),
            )
            for teacher in self.teachers
        )
        return Batch(step, rows, pixels, parts)

    def batches(self, first: int, last: int, *, threads: int) -> Generator[Batch]:
        """Batches of steps first to last - 1, made ahead in threads."""
        with ThreadPoolExecutor(threads, thread_name_prefix="data") as pool:
            yield from ahead(pool, self.batch, range(first, last), depth=threads + 2)

    def _image(self, row: int) -> Image.Image:
        try:
            return decode_image(self.cache.read_file(row), max_pixels=self.cache.meta.max_pixels)
        except ImageError as exc:
            raise TrainingError(f"image {self.cache.index.key(row)} of {self.cache.url}: {exc}") from exc


class TargetMaker:
    """Turns a teacher's part of a batch into targets on the device. Statistics come from the cache."""

    def __init__(self, teacher: CachedTeacher, *, standardise: bool, device: torch.device) -> None:
        self._decoder, self._device = MapDecoder(teacher.codec, device), device
        self.spatial_mean_std = self._statistics(*teacher.spatial_mean_std()) if standardise else None
        has_summary = teacher.spec.summary_dim is not None
        self.summary_mean_std = self._statistics(*teacher.summary_mean_std()) if standardise and has_summary else None

    def __call__(self, part: TeacherBatch) -> Targets:
        device = self._device
        rows, columns, kept = (torch.from_numpy(a).to(device, non_blocking=True) for a in
                               (part.weights.rows, part.weights.columns, part.weights.kept))  # fmt: skip
        codes = torch.from_numpy(part.codes).to(device, non_blocking=True)
        # Crops are cut before the codec's last step, which is linear: what is cut away need not be rotated.
        spatial = self._decoder.features(crop_maps(self._decoder.coordinates(codes), rows, columns))
        if self.spatial_mean_std:
            spatial = (spatial - self.spatial_mean_std[0]) / self.spatial_mean_std[1]
        summary = None if part.summary is None else torch.from_numpy(part.summary).to(device, non_blocking=True)
        if summary is not None and self.summary_mean_std:
            summary = (summary - self.summary_mean_std[0]) / self.summary_mean_std[1]
        valid = torch.from_numpy(part.weights.valid).to(device, non_blocking=True).flatten(1)
        return Targets(spatial, valid, summary, kept)

    def _statistics(self, mean: NDArray[np.float64], std: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        # A channel that never moves carries nothing; dividing by its deviation would only amplify rounding.
        floor = max(1e-6, 1e-3 * float(np.median(std)))
        return (
            torch.from_numpy(mean).to(self._device, torch.float32),
            torch.from_numpy(np.maximum(std, floor)).to(self._device, torch.float32),
        )
