"""From a cache to batches: pixels of fresh random crops, and what samples each teacher's map under them.

The order of images and every crop are pure functions of the recipe's seed and the image's place in the run: threads and
processes change the speed, never the data, and a resumed run sees what an uninterrupted one would have seen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from radio_cache.errors import ConfigError, ImageError, TrainingError
from radio_cache.geometry.crops import (
    BoxXYXY,
    ViewGeometry,
    crop_weights,
    intersect_xyxy,
    random_box_xyxy,
    rescaled_box_xyxy,
    visible_box_xyxy,
)
from radio_cache.geometry.views import View
from radio_cache.prefetch.page_memory import page_array
from radio_cache.reader import Cache, CachedTeacher
from trainer.data.batch import Batch, LevelCodes, Targets, TeacherCodes
from trainer.data.levels import Levels, draw_area
from trainer.data.sampler import Sampler
from trainer.model.eval_view import StudentFit
from trainer.recipes.recipe import Recipe

_CROPS = 1
"""A stream of random numbers drawn from the recipe's seed."""

_SAMPLED_CROPS = 512
"""Crops that tell how much of an image is kept on average; known to a few per cent, and the same for the whole run."""


def student_pixels(image: Image.Image, image_hw: tuple[int, int], box_xyxy: BoxXYXY | None = None) -> NDArray[np.uint8]:
    """A student's view: the box of the image (all of it by default), resized to `image_hw`; (h, w, 3) uint8.

    Bicubic with area averaging, from the exact, fractional box, so that pixels and targets are cut at the same place.
    """
    h, w = image_hw
    return np.array(image.resize((w, h), Image.Resampling.BICUBIC, box=box_xyxy), dtype=np.uint8)


def eval_box_xyxy(image_hw: tuple[int, int], fit: StudentFit, centre_share: float) -> BoxXYXY | None:
    """Return the box of an image that a student sees outside of training, in image pixels; None for all of it ("squash").

    `trainer.model.eval_view.eval_pixels` makes the pixels, which lie there to a pixel.
    centre_share: share of the shorter side that the centre square of "crop" keeps (`StudentConfig.centre_share`).
    """
    if fit == "squash":
        return None
    h, w = image_hw
    half = centre_share * min(h, w) / 2
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
class Crops:
    """What a pass shows, before anything is read.

    rows (b,): images. sizes_hw, boxes: of each image in pixels, and what the targets show of it. shown: what the student
    sees, which lies shift_yx (b, 2) tokens beside it. jitter (b, 3): of colours, or None. views: which stored view an image is
    shown as, 0 for a fresh crop; flipped: whether it is mirrored.
    """

    rows: NDArray[np.int64]
    sizes_hw: list[tuple[int, int]]
    boxes: list[BoxXYXY]
    student_boxes: list[BoxXYXY]
    shift_yx: torch.Tensor | None
    jitter: torch.Tensor | None
    views: list[int]
    flipped: list[bool]


class CodeReader(Protocol):
    """How stored codes come from a level of a teacher: straight from its shards, or through a cache of whole shards."""

    def __call__(self, teacher: CachedTeacher, rows: NDArray[np.int64], out: NDArray[Any], view: int, /) -> object: ...


class CropData:
    """The images of a cache as one group of teachers and one student resolution see them.

    rows: all images, sorted. order: the one in which they come. seed: of this group's random numbers.
    image_px: side of the student's crop; grid_hw: its tokens. mosaic: crops along each side of what the student sees.
    """

    def __init__(
        self,
        cache: Cache,
        teachers: Sequence[str],
        recipe: Recipe,
        rows: NDArray[np.int64],
        order: Sampler,
        *,
        seed: tuple[int, ...],
        image_px: int,
        grid_hw: tuple[int, int],
        mosaic: int = 1,
    ) -> None:
        self.cache, self.recipe, self.order = cache, recipe, order
        self.image_px, self.grid_hw, self.mosaic = image_px, grid_hw, mosaic
        self._seed = seed
        self.levels = {name: Levels.of(cache.teachers.levels(name), image_px, recipe.match) for name in teachers}
        self.target_hw = {name: self._target_hw(levels.geometry.grid_hw) for name, levels in self.levels.items()}
        self._num_views = self._common_views() if recipe.views > 0 else 1
        self._kept = self._expected_kept(rows)

    def crops(self, number: int, first: int, last: int) -> Crops:
        """Of the images [first, last) of a batch."""
        rows = self.order.rows(number, first, last)
        start = number << 32  # places of images in batches stay far below
        rngs = [np.random.default_rng((*self._seed, _CROPS, start + place)) for place in range(first, last)]
        return self._drawn(rows, rngs)

    def _drawn(self, rows: NDArray[np.int64], rngs: list[np.random.Generator]) -> Crops:
        recipe = self.recipe
        sizes: list[tuple[int, int]] = []
        boxes: list[BoxXYXY] = []
        shown: list[BoxXYXY] = []
        views: list[int] = []
        flipped: list[bool] = []
        shifts = np.zeros((len(rows), 2), np.int64)
        jitter = np.ones((len(rows), 3), np.float32)
        for place, (row, rng) in enumerate(zip(rows, rngs, strict=True)):
            h, w = self.cache.sizes_hw[row]
            hw = (int(h), int(w))
            seen = intersect_xyxy([visible_box_xyxy(hw, geometry) for geometry in self._geometries()])
            sizes.append(hw)
            stored = self._drawn_view(rng, int(row))
            views.append(stored[0])
            flipped.append(stored[1].flipped if stored[1] else False)
            area = recipe.crop_area
            if stored[1]:
                x0, y0, x1, y1 = stored[1].box_xyxy
                box = (float(x0), float(y0), float(x1), float(y1))
            else:
                if recipe.match == "draw":
                    area = draw_area(rng, list(self.levels.values()), hw, recipe.crop_area)
                box = random_box_xyxy(rng, seen, area=area, ratio=recipe.crop_ratio)
            boxes.append(box)
            if recipe.shift_tokens > 0 and not stored[1]:
                box, shifts[place] = shifted_box_xyxy(rng, box, seen, self.grid_hw, recipe.shift_tokens)
            shown.append(box)
            if recipe.colour_jitter > 0:
                jitter[place] = rng.uniform(max(0.0, 1 - recipe.colour_jitter), 1 + recipe.colour_jitter, 3)
        return Crops(
            rows,
            sizes,
            boxes,
            shown,
            torch.from_numpy(shifts) if recipe.shift_tokens > 0 else None,
            torch.from_numpy(jitter) if recipe.colour_jitter > 0 else None,
            views,
            flipped,
        )

    def read_pixels(self, crops: Crops, out: NDArray[np.uint8]) -> None:
        """Fill out (b, image_px, image_px, 3). Raises TrainingError naming an image that cannot be read any more."""
        side = (self.image_px, self.image_px)
        for place, (row, box, hw) in enumerate(zip(crops.rows, crops.student_boxes, crops.sizes_hw, strict=True)):
            x0, y0, x1, y1 = box
            # As large as the crop needs it, and no larger: decoding is most of what an image costs.
            image = self.image(int(row), math.ceil(self.image_px * max(hw[0] / (y1 - y0), hw[1] / (x1 - x0))))
            # A cache may keep its images smaller than they were.
            pixels = student_pixels(image, side, rescaled_box_xyxy(box, hw, (image.height, image.width)))
            out[place] = pixels[:, ::-1] if crops.flipped[place] else pixels

    def read_teacher(self, name: str, crops: Crops, read: CodeReader, out: Sequence[NDArray[Any]]) -> TeacherCodes:
        """One teacher's part of a batch. out: for each of its levels, (b, *row_shape) codes to read into."""
        levels = self.levels[name]
        views = np.array(crops.views)
        chosen = np.array(
            [
                levels.reference if view else levels.for_crop(box, hw)
                for view, box, hw in zip(crops.views, crops.boxes, crops.sizes_hw, strict=True)
            ]
        )
        target_hw = self.target_hw[name]
        valid = np.empty((len(crops.rows), *target_hw), np.bool_)
        kept = np.empty(len(crops.rows), np.float32)
        reference = levels.all[levels.reference]
        # A summary speaks of one image, and a student's of all that it sees.
        summary_dim = reference.spec.summary_dim if self.mosaic == 1 else None
        summary = None if summary_dim is None else np.empty((len(crops.rows), summary_dim), np.float32)
        parts: list[LevelCodes] = []
        used = [0] * len(levels.all)
        for number, view in sorted(set(zip(chosen.tolist(), crops.views, strict=True))):
            level = levels.all[number]
            places = np.flatnonzero((chosen == number) & (views == view))
            codes = out[number][used[number] : used[number] + len(places)]
            used[number] += len(places)
            read(level, crops.rows[places], codes, view)
            boxes, sizes = self._in_frame(crops, places, view)
            weights = crop_weights(boxes, sizes, level.spec.geometry, out_hw=target_hw)
            valid[places], kept[places] = weights.valid, weights.kept / self._kept[name]
            parts.append(LevelCodes(number, *map(torch.from_numpy, (places, codes, weights.rows, weights.columns))))
            if summary is not None:
                summary[places] = reference.summaries(crops.rows[places], view=view)
        told = None if summary is None else torch.from_numpy(summary)
        return TeacherCodes(tuple(parts), torch.from_numpy(valid), torch.from_numpy(kept), told)

    def _in_frame(
        self, crops: Crops, places: NDArray[np.int64], view: int
    ) -> tuple[list[BoxXYXY], list[tuple[int, int]]]:
        """Boxes, and sizes of the images they lie in: of the whole image, or of a stored view, which is one of its own."""
        boxes = [crops.boxes[place] for place in places]
        if view == 0:
            return boxes, [crops.sizes_hw[place] for place in places]
        sizes = [(round(y1 - y0), round(x1 - x0)) for x0, y0, x1, y1 in boxes]
        return [(0.0, 0.0, float(w), float(h)) for h, w in sizes], sizes

    def _drawn_view(self, rng: np.random.Generator, row: int) -> tuple[int, View | None]:
        """The number of a stored view and where it lies, or 0 for a fresh crop."""
        if self.recipe.views == 0 or rng.uniform() >= self.recipe.views:
            return 0, None
        number = int(rng.integers(1, self._num_views))
        teacher = next(iter(self.levels.values()))
        return number, teacher.all[teacher.reference].views_of([row], view=number)[0]

    def _common_views(self) -> int:
        """Views of every teacher, the whole image among them. Raises ConfigError where there are none, or others each."""
        specs = [levels.all[levels.reference].spec for levels in self.levels.values()]
        first = specs[0]
        for spec in specs:
            if spec.views < 2:
                raise ConfigError(
                    f"{self.cache.url}: views={self.recipe.views:g} asks for stored views, and teacher '{spec.name}' has none: "
                    "--set views=0, or build a cache with --views K"
                )
            if spec.view_sampling != first.view_sampling:
                raise ConfigError(
                    f"{self.cache.url}: teachers '{first.name}' and '{spec.name}' have different views: --set views=0"
                )
        return min(spec.views for spec in specs)

    @property
    def head_hw(self) -> tuple[int, int]:
        """Tokens of what a head says of a crop, which may be finer than the student's."""
        finer = self.recipe.adaptor_upsample
        return self.grid_hw[0] * finer, self.grid_hw[1] * finer

    def head_shift_yx(self, shift_yx: torch.Tensor | None) -> torch.Tensor | None:
        """A shift (b, 2) in the student's tokens as one in the head's; None stays None."""
        return None if shift_yx is None else shift_yx * self.recipe.adaptor_upsample

    def code_buffers(self, name: str, images: int) -> list[NDArray[Any]]:
        """New memory for `read_teacher`."""
        return [page_array((images, *level.row_shape), level.codec.dtype) for level in self.levels[name].all]

    def batch(self, number: int, first: int, last: int) -> Batch:
        """The images [first, last) of a batch, in new memory; `trainer.data.loader` does the same ahead of time in old memory."""
        crops = self.crops(number, first, last)
        pixels = np.empty((len(crops.rows), self.image_px, self.image_px, 3), np.uint8)
        self.read_pixels(crops, pixels)
        parts = tuple(
            self.read_teacher(name, crops, read_codes, self.code_buffers(name, len(crops.rows))) for name in self.levels
        )
        return make_batch(crops, torch.from_numpy(pixels), parts)

    def _geometries(self) -> list[ViewGeometry]:
        return [levels.geometry for levels in self.levels.values()]

    def _expected_kept(self, rows: NDArray[np.int64]) -> dict[str, float]:
        """Teacher -> the mean of `CropWeights.kept` over this group's crops, from a sample that only the seed decides."""
        rng = np.random.default_rng((*self._seed, _CROPS))
        sample = self._drawn(rng.choice(rows, _SAMPLED_CROPS), [rng] * _SAMPLED_CROPS)
        fresh = np.array(sample.views) == 0
        found: dict[str, float] = {}
        for name, levels in self.levels.items():
            kept = np.ones(len(fresh))  # of a stored view, the summary speaks of all
            if fresh.any():
                boxes, sizes = self._in_frame(sample, np.flatnonzero(fresh), 0)
                kept[fresh] = crop_weights(boxes, sizes, levels.geometry, out_hw=(1, 1)).kept
            found[name] = float(kept.mean())
        return found

    def _target_hw(self, teacher_hw: tuple[int, int]) -> tuple[int, int]:
        """The grid on which a teacher's map and its head's meet: the head's, or the larger of the two."""
        head_hw = (self.grid_hw[0] * self.recipe.adaptor_upsample, self.grid_hw[1] * self.recipe.adaptor_upsample)
        if self.recipe.target_grid == "student":
            return head_hw
        share = np.sqrt(self.recipe.crop_area[1])
        h, w = (max(mine, int(np.ceil(theirs * share))) for mine, theirs in zip(head_hw, teacher_hw, strict=True))
        return (h, w)

    def refuse_unreadable_pixels(self) -> None:
        """Raise TrainingError, before a run begins, if images cannot be had: moved, or others than the build saw."""
        row = int(self.order.rows(0, 0, 1)[0])
        try:
            self.image(row)
        except TrainingError as exc:
            places = ", ".join(container.path for container in self.cache.meta.containers)
            raise TrainingError(
                f"{exc}. Training reads the images where the build found them ({places}): put them back, or build a cache of "
                "those that are there"
            ) from exc

    def image(self, row: int, least_px: int | None = None) -> Image.Image:
        """The whole image, as the source or the cache has it: perhaps smaller than the build saw it.

        least_px: it may be still smaller, but for so many pixels along each side. Raises TrainingError naming one that cannot be
        read any more.
        """
        try:
            return self.cache.decode(self.cache.read_pixels(row), least_px=least_px)
        except ImageError as exc:
            raise TrainingError(f"image {self.cache.index.key(row)} of {self.cache.url}: {exc}") from exc


def read_codes(teacher: CachedTeacher, rows: NDArray[np.int64], out: NDArray[Any], view: int) -> object:
    """Straight from the shards."""
    return teacher.codes(rows, out=out, view=view)


def make_batch(crops: Crops, pixels: torch.Tensor, parts: tuple[TeacherCodes | Targets, ...]) -> Batch:
    """A batch of what was planned and what was read."""
    return Batch(crops.rows, pixels, parts, crops.shift_yx, crops.jitter)
