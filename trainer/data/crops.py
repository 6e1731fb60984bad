"""Crops and colour augmentation: pixels of random crops of a cache's images, and matrices that crop each teacher's maps alike.

The order of images and every crop are pure functions of the recipe's seed and the image's position in the run. Threads and
processes change the speed, never the data, and a resumed run takes the crops of an uninterrupted one.
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
"""Number of a random stream derived from the recipe's seed."""

_SAMPLED_CROPS = 512
"""Crops from which the mean coverage is estimated: to a few per cent, and once for the whole run."""


def student_pixels(image: Image.Image, image_hw: tuple[int, int], box_xyxy: BoxXYXY | None = None) -> NDArray[np.uint8]:
    """Return a crop of an image, resized to `image_hw`, as (h, w, 3) uint8.

    Bicubic with area averaging, from the exact, fractional box, so that pixels and targets are cropped at the same position.

    Args:
        image: image to crop.
        image_hw: height and width of the result in pixels.
        box_xyxy: box in image pixels; None for the whole image.
    """
    h, w = image_hw
    return np.array(image.resize((w, h), Image.Resampling.BICUBIC, box=box_xyxy), dtype=np.uint8)


def eval_box_xyxy(image_hw: tuple[int, int], fit: StudentFit, centre_share: float) -> BoxXYXY | None:
    """Return the box that a student's input covers outside of training, in image pixels; None for the whole image ("squash").

    `trainer.model.eval_view.eval_pixels` makes the pixels, from this box up to rounding to a pixel.

    Args:
        image_hw: height and width of the image.
        fit: whether the student takes a centre crop or the squashed image.
        centre_share: side of the centre crop as a share of the shorter side (`StudentConfig.centre_share`).
    """
    if fit == "squash":
        return None
    h, w = image_hw
    half = centre_share * min(h, w) / 2
    return (w / 2 - half, h / 2 - half, w / 2 + half, h / 2 + half)


def shifted_box_xyxy(
    rng: np.random.Generator, box: BoxXYXY, within: BoxXYXY, grid_hw: tuple[int, int], std_tokens: float
) -> tuple[BoxXYXY, tuple[int, int]]:
    """Shift a box by round(N(0, std_tokens)) whole tokens along each axis.

    Along an axis there is no shift if it would leave `within`, or if half of the tokens or more would no longer overlap.

    Args:
        rng: random generator; two numbers are drawn.
        box: box to shift.
        within: box that the result stays in.
        grid_hw: tokens of the box.
        std_tokens: standard deviation in tokens.

    Returns:
        The shifted box, and its shift (down, right) in tokens.

    Source: C-RADIOv4, arXiv 2601.17237, where the deviation is 0.5.
    """
    x0, y0, x1, y1 = box
    shifts: list[int] = []
    for size, low, high, tokens, lower_limit, upper_limit in (
        (y1 - y0, y0, y1, grid_hw[0], within[1], within[3]),
        (x1 - x0, x0, x1, grid_hw[1], within[0], within[2]),
    ):
        shift = round(rng.normal(0.0, std_tokens))
        distance = shift * size / tokens
        fits = low + distance >= lower_limit and high + distance <= upper_limit
        shifts.append(shift if fits and 2 * abs(shift) < tokens else 0)
    down, right = shifts[0] * (y1 - y0) / grid_hw[0], shifts[1] * (x1 - x0) / grid_hw[1]
    return (x0 + right, y0 + down, x1 + right, y1 + down), (shifts[0], shifts[1])


@dataclass(frozen=True)
class Crops:
    """The crops of one forward pass, drawn before anything is read.

    Attributes:
        rows: (b,) rows of the cache.
        sizes_hw: size of each image in pixels.
        boxes: crop of each image that the targets cover, in image pixels.
        student_boxes: crop of each image that the student takes, `shift_yx` tokens away from `boxes`.
        shift_yx: (b, 2) shift (down, right) in the student's tokens, or None.
        jitter: (b, 3) colour factors, or None.
        views: number of the stored view that is used of each image, 0 for a fresh crop.
        flipped: whether each crop is mirrored.
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
    """A function that reads stored codes of a level of a teacher: from its shards, or through a cache of whole shards."""

    def __call__(self, teacher: CachedTeacher, rows: NDArray[np.int64], out: NDArray[Any], view: int, /) -> object:
        """Read the codes (b, *row_shape) of rows (b,) of a stored view into `out`."""
        ...


class CropData:
    """The batches of one group of a recipe: its teachers at its student resolution.

    Args:
        cache: cache of images and features.
        teachers: names of the group's teachers.
        recipe: recipe of the run.
        rows: all rows to train on, sorted.
        sampler: order of the rows.
        seed: seed of this group's random streams.
        image_px: side of a crop in pixels.
        grid_hw: the student's tokens for a crop.
        mosaic: crops along each side of the student's input.
    """

    def __init__(
        self,
        cache: Cache,
        teachers: Sequence[str],
        recipe: Recipe,
        rows: NDArray[np.int64],
        sampler: Sampler,
        *,
        seed: tuple[int, ...],
        image_px: int,
        grid_hw: tuple[int, int],
        mosaic: int = 1,
    ) -> None:
        self.cache, self.recipe, self.sampler = cache, recipe, sampler
        self.image_px, self.grid_hw, self.mosaic = image_px, grid_hw, mosaic
        self._seed = seed
        self.levels = {name: Levels.of(cache.teachers.levels(name), image_px, recipe.match) for name in teachers}
        self.target_hw = {name: self._target_hw(levels.geometry.grid_hw) for name, levels in self.levels.items()}
        self._num_views = self._common_views() if recipe.views > 0 else 1
        self._mean_coverage = self._expected_coverage(rows)

    def crops(self, number: int, first: int, last: int) -> Crops:
        """Draw the crops of the images [first, last) of a batch."""
        rows = self.sampler.rows(number, first, last)
        start = number << 32  # positions within batches stay far below
        rngs = [np.random.default_rng((*self._seed, _CROPS, start + position)) for position in range(first, last)]
        return self._draw_crops(rows, rngs)

    def _draw_crops(self, rows: NDArray[np.int64], rngs: list[np.random.Generator]) -> Crops:
        recipe = self.recipe
        sizes: list[tuple[int, int]] = []
        boxes: list[BoxXYXY] = []
        student_boxes: list[BoxXYXY] = []
        views: list[int] = []
        flipped: list[bool] = []
        shifts = np.zeros((len(rows), 2), np.int64)
        jitter = np.ones((len(rows), 3), np.float32)
        # The draws of an image come in a fixed order: a recipe that draws less leaves the earlier ones as they are.
        for position, (row, rng) in enumerate(zip(rows, rngs, strict=True)):
            h, w = self.cache.sizes_hw[row]
            hw = (int(h), int(w))
            # No crop reaches beyond what every teacher's view covers.
            visible = intersect_xyxy([visible_box_xyxy(hw, geometry) for geometry in self._geometries()])
            sizes.append(hw)
            view_number, stored_view = self._draw_view(rng, int(row))
            views.append(view_number)
            flipped.append(stored_view.flipped if stored_view else False)
            area = recipe.crop_area
            if stored_view:
                x0, y0, x1, y1 = stored_view.box_xyxy
                box = (float(x0), float(y0), float(x1), float(y1))
            else:
                if recipe.match == "draw":
                    area = draw_area(rng, list(self.levels.values()), hw, recipe.crop_area)
                box = random_box_xyxy(rng, visible, area=area, ratio=recipe.crop_ratio)
            boxes.append(box)
            if recipe.shift_tokens > 0 and not stored_view:
                box, shifts[position] = shifted_box_xyxy(rng, box, visible, self.grid_hw, recipe.shift_tokens)
            student_boxes.append(box)
            # One factor each for brightness, contrast and saturation.
            if recipe.colour_jitter > 0:
                jitter[position] = rng.uniform(max(0.0, 1 - recipe.colour_jitter), 1 + recipe.colour_jitter, 3)
        return Crops(
            rows,
            sizes,
            boxes,
            student_boxes,
            torch.from_numpy(shifts) if recipe.shift_tokens > 0 else None,
            torch.from_numpy(jitter) if recipe.colour_jitter > 0 else None,
            views,
            flipped,
        )

    def read_pixels(self, crops: Crops, out: NDArray[np.uint8]) -> None:
        """Decode the images and write their crops into `out` (b, image_px, image_px, 3).

        Raises:
            TrainingError: an image cannot be read; the message names it.
        """
        side = (self.image_px, self.image_px)
        for position, (row, box, hw) in enumerate(zip(crops.rows, crops.student_boxes, crops.sizes_hw, strict=True)):
            x0, y0, x1, y1 = box
            # No larger than the crop needs it: decoding dominates the cost of an image.
            image = self.image(int(row), math.ceil(self.image_px * max(hw[0] / (y1 - y0), hw[1] / (x1 - x0))))
            # A cache may store images at a smaller size than the source's, in which `box` is given.
            pixels = student_pixels(image, side, rescaled_box_xyxy(box, hw, (image.height, image.width)))
            out[position] = pixels[:, ::-1] if crops.flipped[position] else pixels

    def read_teacher(self, name: str, crops: Crops, read: CodeReader, out: Sequence[NDArray[Any]]) -> TeacherCodes:
        """Read the codes and summaries of one teacher for a batch, and compute the matrices that crop them.

        Args:
            name: name of the teacher.
            crops: crops of the batch.
            read: reader of codes.
            out: one buffer (b, *row_shape) for each level, which the codes are read into.
        """
        levels = self.levels[name]
        views = np.array(crops.views)
        # A stored view is kept at the reference level alone.
        level_numbers = np.array(
            [
                levels.reference if view else levels.for_crop(box, hw)
                for view, box, hw in zip(crops.views, crops.boxes, crops.sizes_hw, strict=True)
            ]
        )
        target_hw = self.target_hw[name]
        valid = np.empty((len(crops.rows), *target_hw), np.bool_)
        coverage = np.empty(len(crops.rows), np.float32)
        reference = levels.all[levels.reference]
        # A teacher's summary describes one image, and a student's the whole mosaic.
        summary_dim = reference.spec.summary_dim if self.mosaic == 1 else None
        summary = None if summary_dim is None else np.empty((len(crops.rows), summary_dim), np.float32)
        level_codes: list[LevelCodes] = []
        num_used = [0] * len(levels.all)
        # One read for each level and stored view that occurs in the batch.
        for number, view in sorted(set(zip(level_numbers.tolist(), crops.views, strict=True))):
            level = levels.all[number]
            positions = np.flatnonzero((level_numbers == number) & (views == view))
            codes = out[number][num_used[number] : num_used[number] + len(positions)]
            num_used[number] += len(positions)
            read(level, crops.rows[positions], codes, view)
            boxes, sizes = self._boxes_in_view(crops, positions, view)
            weights = crop_weights(boxes, sizes, level.spec.geometry, out_hw=target_hw)
            # valid (k, out_h, out_w), kept (k,), rows (k, out_h, grid_h), columns (k, out_w, grid_w)
            valid[positions] = weights.valid
            coverage[positions] = weights.coverage / self._mean_coverage[name]
            arrays = (positions, codes, weights.rows, weights.columns)
            level_codes.append(LevelCodes(number, *map(torch.from_numpy, arrays)))
            if summary is not None:
                summary[positions] = reference.summaries(crops.rows[positions], view=view)
        return TeacherCodes(
            tuple(level_codes),
            torch.from_numpy(valid),
            torch.from_numpy(coverage),
            None if summary is None else torch.from_numpy(summary),
        )

    def _boxes_in_view(
        self, crops: Crops, positions: NDArray[np.int64], view: int
    ) -> tuple[list[BoxXYXY], list[tuple[int, int]]]:
        """Return boxes and the sizes of the images that they lie in: whole images, or stored views as images of their own."""
        boxes = [crops.boxes[position] for position in positions]
        if view == 0:
            return boxes, [crops.sizes_hw[position] for position in positions]
        # A stored view is used whole.
        sizes = [(round(y1 - y0), round(x1 - x0)) for x0, y0, x1, y1 in boxes]
        return [(0.0, 0.0, float(w), float(h)) for h, w in sizes], sizes

    def _draw_view(self, rng: np.random.Generator, row: int) -> tuple[int, View | None]:
        """Return the number and the box of a stored view, or (0, None) for a fresh crop."""
        if self.recipe.views == 0 or rng.uniform() >= self.recipe.views:
            return 0, None
        # View 0 is the whole image, of which a fresh crop is taken.
        number = int(rng.integers(1, self._num_views))
        teacher = next(iter(self.levels.values()))
        return number, teacher.all[teacher.reference].views_of([row], view=number)[0]

    def _common_views(self) -> int:
        """Return the number of views that every teacher has, the whole image included.

        Raises:
            ConfigError: a teacher has no stored views, or teachers have different ones.
        """
        specs = [levels.all[levels.reference].spec for levels in self.levels.values()]
        # The same sampling draws the same boxes, so that one crop of pixels serves all teachers.
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
        """Tokens (height, width) of a head's output for a crop, which may be finer than the student's."""
        finer = self.recipe.adaptor_upsample
        return self.grid_hw[0] * finer, self.grid_hw[1] * finer

    def head_shift_yx(self, shift_yx: torch.Tensor | None) -> torch.Tensor | None:
        """Return a shift (b, 2) in the head's tokens from one in the student's; None stays None."""
        return None if shift_yx is None else shift_yx * self.recipe.adaptor_upsample

    def code_buffers(self, name: str, images: int) -> list[NDArray[Any]]:
        """Allocate the buffers that `read_teacher` reads into, one for each level."""
        return [page_array((images, *level.row_shape), level.codec.dtype) for level in self.levels[name].all]

    def batch(self, number: int, first: int, last: int) -> Batch:
        """Return the images [first, last) of a batch in new memory; `trainer.data.loader` does this ahead, in reused buffers."""
        crops = self.crops(number, first, last)
        # (b, image_px, image_px, 3)
        pixels = np.empty((len(crops.rows), self.image_px, self.image_px, 3), np.uint8)
        self.read_pixels(crops, pixels)
        teachers = tuple(
            self.read_teacher(name, crops, read_codes, self.code_buffers(name, len(crops.rows))) for name in self.levels
        )
        return make_batch(crops, torch.from_numpy(pixels), teachers)

    def _geometries(self) -> list[ViewGeometry]:
        return [levels.geometry for levels in self.levels.values()]

    def _expected_coverage(self, rows: NDArray[np.int64]) -> dict[str, float]:
        """Return teacher -> mean of `CropWeights.coverage` over this group's crops, from a sample that the seed determines."""
        rng = np.random.default_rng((*self._seed, _CROPS))
        sample = self._draw_crops(rng.choice(rows, _SAMPLED_CROPS), [rng] * _SAMPLED_CROPS)
        fresh = np.array(sample.views) == 0
        means: dict[str, float] = {}
        for name, levels in self.levels.items():
            coverage = np.ones(len(fresh))  # the summary of a stored view describes all of it
            if fresh.any():
                boxes, sizes = self._boxes_in_view(sample, np.flatnonzero(fresh), 0)
                coverage[fresh] = crop_weights(boxes, sizes, levels.geometry, out_hw=(1, 1)).coverage
            means[name] = float(coverage.mean())
        return means

    def _target_hw(self, teacher_hw: tuple[int, int]) -> tuple[int, int]:
        """Return the grid of the spatial loss (`Recipe.target_grid`): the head's, or the larger of the head's and the crop's."""
        head_hw = (self.grid_hw[0] * self.recipe.adaptor_upsample, self.grid_hw[1] * self.recipe.adaptor_upsample)
        if self.recipe.target_grid == "student":
            return head_hw
        # The largest crop has this share of the teacher's tokens along each side.
        share = np.sqrt(self.recipe.crop_area[1])
        # Along each axis by itself: neither grid need hold the other.
        h, w = (max(head, int(np.ceil(teacher * share))) for head, teacher in zip(head_hw, teacher_hw, strict=True))
        return (h, w)

    def refuse_unreadable_pixels(self) -> None:
        """Raise TrainingError, before a run begins, if images were moved, or changed since the build."""
        # One image shows whether the source was moved; reading all would be slow.
        row = int(self.sampler.rows(0, 0, 1)[0])
        try:
            self.image(row)
        except TrainingError as exc:
            sources = ", ".join(container.path for container in self.cache.meta.containers)
            raise TrainingError(
                f"{exc}. Training reads the images where the build found them ({sources}): put them back, or build a cache of "
                "those that are there"
            ) from exc

    def image(self, row: int, least_px: int | None = None) -> Image.Image:
        """Return a whole image from the source or the cache, perhaps smaller than it was in the build.

        Args:
            row: row of the cache.
            least_px: pixels along each side that the image needs; it may be decoded at any size from there.

        Raises:
            TrainingError: the image cannot be read; the message names it.
        """
        try:
            return self.cache.decode(self.cache.read_pixels(row), least_px=least_px)
        except ImageError as exc:
            raise TrainingError(f"image {self.cache.index.key(row)} of {self.cache.url}: {exc}") from exc


def read_codes(teacher: CachedTeacher, rows: NDArray[np.int64], out: NDArray[Any], view: int) -> object:
    """Read codes from the teacher's shards; the plain `CodeReader`."""
    return teacher.codes(rows, out=out, view=view)


def make_batch(crops: Crops, pixels: torch.Tensor, teachers: tuple[TeacherCodes | Targets, ...]) -> Batch:
    """Return the batch of drawn crops with their pixels and their teachers' codes or targets."""
    return Batch(crops.rows, pixels, teachers, crops.shift_yx, crops.jitter)
