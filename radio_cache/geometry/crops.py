"""Crop geometry, written once: image pixels -> teacher input pixels -> teacher grid -> student grid.

Frames. All coordinates are continuous, x to the right and y down. *Image pixels*: the decoded, upright image; pixel
k covers [k, k + 1]. *Input pixels*: the same for the tensor a teacher receives. *Grid*: one unit is one token, and
token k covers [k, k + 1], so its centre lies at k + 0.5 (half-pixel centres).

Everything is plain numbers and numpy, so that the CPU side, the device side and the tests use one definition. The
device only multiplies by the matrices of `resample_weights`.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import ConfigError, ImageError

Fit = Literal["squash", "crop", "pad"]
Interpolation = Literal["bilinear", "bicubic"]
BoxXYXY = tuple[float, float, float, float]

MAX_RESIZED_PIXELS = 64_000_000
"""Largest image a resize may produce on its way to a teacher; a 20000 x 2 strip would need gigabytes."""


@dataclass(frozen=True, kw_only=True)
class ViewGeometry:
    """The mapping from an image to a teacher's input, and the positions of the teacher's tokens in it.

    Attributes:
        fit: `squash` resizes to `input_hw` and ignores the aspect ratio. `crop` resizes the shorter side to `resize_px`
            and crops `input_hw` from the centre. `pad` resizes the longer side to `resize_px` and pads right and bottom.
        stride_px: distance of tokens. Token (i, j) is centred at input pixel (offset_y + i * stride, offset_x + j * stride).
        offset_px: centre of the first token. For a ViT it is half a patch. For convolutions with TensorFlow's "same" padding it
            is not: the last token of EfficientNet-Lite0 at 224 px is centred at pixel 223.5.
    """

    fit: Fit
    input_hw: tuple[int, int]
    resize_px: int
    interpolation: Interpolation
    grid_hw: tuple[int, int]
    stride_px: float
    offset_px: float

    def __post_init__(self) -> None:
        if self.fit not in ("squash", "crop", "pad"):
            raise ConfigError(f"fit '{self.fit}' is none of squash, crop, pad")
        if min(*self.input_hw, *self.grid_hw, self.resize_px) < 1 or self.stride_px <= 0:
            raise ConfigError(f"view geometry needs sizes of at least one pixel and one token: {self}")

    @property
    def centre_share(self) -> float:
        """Share of the shorter side of an image that the teacher sees; below 1 where a `crop` cuts margins off."""
        return min(1.0, min(self.input_hw) / self.resize_px) if self.fit == "crop" else 1.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def patch_geometry(
    size_px: int, patch_px: int, *, fit: Fit, interpolation: Interpolation, resize_px: int | None = None
) -> ViewGeometry:
    """Return the geometry of a teacher that splits a square input into square patches. `resize_px` defaults to `size_px`."""
    if size_px % patch_px:
        raise ConfigError(
            f"input size {size_px} px is not a multiple of the patch, {patch_px} px; "
            f"nearest: {max(1, round(size_px / patch_px)) * patch_px}"
        )
    tokens = size_px // patch_px
    return ViewGeometry(
        fit=fit,
        input_hw=(size_px, size_px),
        resize_px=resize_px or size_px,
        interpolation=interpolation,
        grid_hw=(tokens, tokens),
        stride_px=float(patch_px),
        offset_px=patch_px / 2,
    )


def resized_hw(image_hw: tuple[int, int], geometry: ViewGeometry) -> tuple[int, int]:
    """Size after the resize and before cropping or padding, in pixels, with each family's own rounding.

    `crop` truncates the longer side as torchvision's Resize does; `pad` rounds half up as SAM's ResizeLongestSide.
    Raises ImageError if the image is so long and thin that the resized one would not fit in memory.
    """
    h, w = image_hw
    if geometry.fit == "squash":
        return geometry.input_hw
    if geometry.fit == "crop":
        short = geometry.resize_px
        # torchvision truncates the longer side. Rounding it would shift every crop by up to half a pixel.
        hw = (short, int(short * w / h)) if h <= w else (int(short * h / w), short)
    else:
        scale = geometry.resize_px / max(h, w)
        # At least one pixel, also for images that are much longer than wide.
        hw = (max(1, int(h * scale + 0.5)), max(1, int(w * scale + 0.5)))
    if hw[0] * hw[1] > MAX_RESIZED_PIXELS:
        raise ImageError(f"{w} x {h} pixels is too long and thin: resized it would be {hw[1]} x {hw[0]}")
    return hw


def crop_offset_yx(resized: tuple[int, int], geometry: ViewGeometry) -> tuple[int, int]:
    """Top-left corner of the centre crop in the resized image (torchvision's CenterCrop rounding); zero unless `crop`."""
    if geometry.fit != "crop":
        return (0, 0)
    return (
        # Python's round is to even, as in torchvision.
        round((resized[0] - geometry.input_hw[0]) / 2.0),
        round((resized[1] - geometry.input_hw[1]) / 2.0),
    )


def valid_hw(image_hw: tuple[int, int], geometry: ViewGeometry) -> tuple[int, int]:
    """Height and width of the input region that shows the image, from the top left; smaller than the input for `pad`."""
    if geometry.fit != "pad":
        return geometry.input_hw
    return resized_hw(image_hw, geometry)


def valid_tokens(image_hw: tuple[int, int], geometry: ViewGeometry) -> NDArray[np.bool_]:
    """Return (grid_h, grid_w) whether the centre of a token lies on the image, and not on padding."""
    limits = valid_hw(image_hw, geometry)
    centres = [geometry.offset_px + geometry.stride_px * np.arange(n) for n in geometry.grid_hw]
    # (grid_h, 1) & (1, grid_w) -> (grid_h, grid_w)
    return (centres[0] <= limits[0])[:, None] & (centres[1] <= limits[1])[None, :]


def visible_box_xyxy(image_hw: tuple[int, int], geometry: ViewGeometry) -> BoxXYXY:
    """Return the part of the image that the teacher sees, in image pixels: the whole image unless `crop` cuts some away."""
    h, w = image_hw
    rh, rw = resized_hw(image_hw, geometry)
    top, left = crop_offset_yx((rh, rw), geometry)
    vh, vw = valid_hw(image_hw, geometry)
    return (
        # Clamped, because the resize rounds: the crop may end a fraction of a pixel outside the image.
        max(0.0, left * w / rw),
        max(0.0, top * h / rh),
        min(float(w), (left + vw) * w / rw),
        min(float(h), (top + vh) * h / rh),
    )


def photo_share(geometry: ViewGeometry, image_hw: tuple[int, int] = (768, 1024)) -> float:
    """Return the share of a photo's area that a teacher sees, from 0 to 1: by default of one that is 4:3."""
    left, top, right, bottom = visible_box_xyxy(image_hw, geometry)
    return (right - left) * (bottom - top) / (image_hw[0] * image_hw[1])


def magnification(image_hw: tuple[int, int], geometry: ViewGeometry) -> float:
    """Input pixels for each image pixel, along one side; the geometric mean where the sides are squashed."""
    return math.sqrt(math.prod(resized_hw(image_hw, geometry)) / math.prod(image_hw))


def image_px_per_token(image_hw: tuple[int, int], geometry: ViewGeometry) -> float:
    """Return the image pixels between two tokens of a teacher, along one side."""
    return geometry.stride_px / magnification(image_hw, geometry)


def nearest_level(
    box_xyxy_px: BoxXYXY, image_hw: tuple[int, int], student_hw: tuple[int, int], levels: Sequence[ViewGeometry]
) -> int:
    """Return the index of the level with the magnification nearest to that of a student's crop.

    Levels are compared by the ratio of magnifications. Of equally near ones the first is returned.

    Args:
        box_xyxy_px: the crop, in image pixels.
        image_hw: of the image, pixels.
        student_hw: size in pixels to which the student's crop is resized.
        levels: geometries of the levels.
    """
    x0, y0, x1, y1 = box_xyxy_px
    student_magnification = math.sqrt(math.prod(student_hw) / ((x1 - x0) * (y1 - y0)))
    # Ratios, not differences: twice and half the size are equally far.
    distances = [abs(math.log(magnification(image_hw, geometry) / student_magnification)) for geometry in levels]
    return distances.index(min(distances))


def box_to_grid(box_xyxy_px: BoxXYXY, image_hw: tuple[int, int], geometry: ViewGeometry) -> BoxXYXY:
    """Return an image box in the teacher's grid coordinates, (x0, y0, x1, y1). It may extend beyond the grid."""
    h, w = image_hw
    rh, rw = resized_hw(image_hw, geometry)
    top, left = crop_offset_yx((rh, rw), geometry)

    def to_grid(coordinate_px: float, scale: float, cut_px: int) -> float:
        # A token's centre has coordinate i + 0.5, so that cell i covers [i, i + 1].
        return (coordinate_px * scale - cut_px - geometry.offset_px) / geometry.stride_px + 0.5

    x0, y0, x1, y1 = box_xyxy_px
    return (
        to_grid(x0, rw / w, left),
        to_grid(y0, rh / h, top),
        to_grid(x1, rw / w, left),
        to_grid(y1, rh / h, top),
    )


def resample_weights(
    lo: NDArray[np.float64],
    hi: NDArray[np.float64],
    valid_lo: NDArray[np.float64],
    valid_hi: NDArray[np.float64],
    *,
    num_in: int,
    num_out: int,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Matrices that sample one axis of a map under an interval: bilinear up, area-averaging down.

    The filter is a triangle one output cell wide when shrinking and one input cell wide when enlarging, with
    half-pixel centres: exactly `PIL.Image.resize(box=..., resample=BILINEAR)`, which the tests compare with.

    lo, hi (b,): the interval in grid units. valid_lo, valid_hi (b,): the part of the axis that shows the image; cells
    whose centre lies outside of it get no weight (padding never leaks into a target).
    Returns weights (b, num_out, num_in), each row summing to 1, and valid (b, num_out): False where the output cell's
    centre lies outside the valid part, where the row repeats the nearest valid cell.
    """
    scale = (hi - lo) / num_out
    if np.any(scale <= 0):
        raise ConfigError("a crop box has no area: its right or lower edge is not beyond the left or upper one")
    # (b, num_out) centres of the output cells, in units of input cells
    centre = lo[:, None] + (np.arange(num_out) + 0.5)[None, :] * scale[:, None]
    cells = np.arange(num_in) + 0.5
    # (b, num_in); the tolerance keeps cells whose centre is on the border despite rounding.
    usable = (cells[None, :] > valid_lo[:, None] - 1e-9) & (cells[None, :] < valid_hi[:, None] + 1e-9)
    # A valid region thinner than half a token holds no cell centre; its nearest cell then stands for it.
    nearest = np.clip(np.floor((valid_lo + valid_hi) / 2).astype(np.int64), 0, num_in - 1)
    usable[np.arange(len(lo)), nearest] |= ~usable.any(axis=1)
    first = np.argmax(usable, axis=1) + 0.5
    last = num_in - 1 - np.argmax(usable[:, ::-1], axis=1) + 0.5
    # Half the width of the triangle: one output cell when shrinking, one input cell when enlarging.
    support = np.maximum(scale, 1.0)[:, None]
    # Centres beyond the usable cells are moved to where the filter still reaches the outermost one.
    inside = np.clip(centre, first[:, None] - support / 2, last[:, None] + support / 2)
    # (b, num_out, num_in)
    distance = np.abs(cells[None, None, :] - inside[:, :, None])
    weights = np.maximum(0.0, 1.0 - distance / support[:, :, None]) * usable[:, None, :]
    # Not zero: `inside` keeps the filter on a usable cell.
    total = weights.sum(axis=2, keepdims=True)
    valid = (centre >= valid_lo[:, None] - 1e-9) & (centre <= valid_hi[:, None] + 1e-9)
    return (weights / total).astype(np.float32), valid


@dataclass(frozen=True)
class CropWeights:
    """The matrices that turn one teacher's maps into targets of a batch of crops.

    Attributes:
        rows: (b, out_h, grid_h) float32; target = rows @ map @ columns^T.
        columns: (b, out_w, grid_w) float32.
        valid: (b, out_h, out_w) output tokens whose centre the teacher saw.
        coverage: (b,) share of the teacher's view inside the crop, in (0, 1]. Summary losses are weighted by it.
    """

    rows: NDArray[np.float32]
    columns: NDArray[np.float32]
    valid: NDArray[np.bool_]
    coverage: NDArray[np.float32]

    def sample(self, maps: NDArray[np.floating]) -> NDArray[np.float32]:
        """Targets (b, out_h, out_w, c) of maps (b, grid_h, grid_w, c), by numpy; `radio_cache.torch.crop_maps` is for devices."""
        # (b, out_h, grid_h), (b, grid_h, grid_w, c), (b, out_w, grid_w) -> (b, out_h, out_w, c)
        sampled = np.einsum("nyh,nhwc,nxw->nyxc", self.rows, maps, self.columns, optimize=True)
        return sampled.astype(np.float32, copy=False)


def crop_weights(
    boxes_xyxy_px: Sequence[BoxXYXY],
    images_hw: Sequence[tuple[int, int]],
    geometry: ViewGeometry,
    *,
    out_hw: tuple[int, int],
) -> CropWeights:
    """Return the matrices that sample a teacher's maps at the tokens of a student's crops.

    Args:
        boxes_xyxy_px: one crop per image, in image pixels.
        images_hw: sizes of the images, pixels.
        geometry: of the teacher.
        out_hw: grid of the student.
    """
    grid = np.array([box_to_grid(box, hw, geometry) for box, hw in zip(boxes_xyxy_px, images_hw, strict=True)])
    seen_px = [visible_box_xyxy(hw, geometry) for hw in images_hw]
    # Padding and cropped margins get no weight, so targets come from the image alone.
    visible = np.array([box_to_grid(box, hw, geometry) for box, hw in zip(seen_px, images_hw, strict=True)])
    rows, valid_y = resample_weights(
        grid[:, 1], grid[:, 3], visible[:, 1], visible[:, 3], num_in=geometry.grid_hw[0], num_out=out_hw[0]
    )
    columns, valid_x = resample_weights(
        grid[:, 0], grid[:, 2], visible[:, 0], visible[:, 2], num_in=geometry.grid_hw[1], num_out=out_hw[1]
    )
    coverage = np.array(
        [_coverage(box, seen_box) for box, seen_box in zip(boxes_xyxy_px, seen_px, strict=True)], np.float32
    )
    return CropWeights(rows, columns, valid_y[:, :, None] & valid_x[:, None, :], coverage)


def _coverage(box: BoxXYXY, visible: BoxXYXY) -> float:
    width = min(box[2], visible[2]) - max(box[0], visible[0])
    height = min(box[3], visible[3]) - max(box[1], visible[1])
    area = (visible[2] - visible[0]) * (visible[3] - visible[1])
    # A crop beside the visible part has no overlap, and no negative one.
    return max(0.0, width) * max(0.0, height) / area


def rescaled_box_xyxy(box_xyxy_px: BoxXYXY, image_hw: tuple[int, int], kept_hw: tuple[int, int]) -> BoxXYXY:
    """Return a box of an image in a smaller copy of it, such as a cache stores; never beyond its edges."""
    if kept_hw == image_hw:
        return box_xyxy_px
    (h, w), (kept_h, kept_w) = image_hw, kept_hw
    x0, y0, x1, y1 = box_xyxy_px
    return (
        max(0.0, x0 * kept_w / w),
        max(0.0, y0 * kept_h / h),
        min(float(kept_w), x1 * kept_w / w),
        min(float(kept_h), y1 * kept_h / h),
    )


def intersect_xyxy(boxes: Sequence[BoxXYXY]) -> BoxXYXY:
    """Return the intersection of several boxes of one image."""
    # (boxes, 4)
    array = np.array(boxes)
    x0, y0, x1, y1 = (*array[:, :2].max(axis=0), *array[:, 2:].min(axis=0))
    return (float(x0), float(y0), float(x1), float(y1))


def random_box_xyxy(
    rng: np.random.Generator, within: BoxXYXY, *, area: tuple[float, float], ratio: tuple[float, float]
) -> BoxXYXY:
    """Draw a random resized crop inside `within`: area share uniform, aspect ratio log-uniform, as in torchvision.

    The ratio is relative to `within`, so that crops of a wide image have, on average, its aspect ratio: the student
    is square, and so is most teachers' view of the image. A box that would not fit is shrunk to the side it exceeds.
    """
    x0, y0, x1, y1 = within
    share = rng.uniform(*area)
    aspect = float(np.exp(rng.uniform(np.log(ratio[0]), np.log(ratio[1]))))
    # Relative to `within`, so 1.0 is its whole side.
    w = min(1.0, float(np.sqrt(share * aspect))) * (x1 - x0)
    h = min(1.0, float(np.sqrt(share / aspect))) * (y1 - y0)
    left = x0 + rng.uniform(0.0, 1.0) * (x1 - x0 - w)
    top = y0 + rng.uniform(0.0, 1.0) * (y1 - y0 - h)
    return (left, top, left + w, top + h)
