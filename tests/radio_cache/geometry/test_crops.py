"""Crop geometry: PIL's resampling, ramps that must come back as ramps, and every family's own rounding."""

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from segment_anything.utils.transforms import ResizeLongestSide
from torchvision.transforms import CenterCrop, Resize

from cache_builder.pipeline.preprocess import view_pixels
from radio_cache.errors import ConfigError, ImageError
from radio_cache.format.strict_json import from_json
from radio_cache.geometry.crops import (
    BoxXYXY,
    CropWeights,
    Fit,
    ViewGeometry,
    crop_offset_yx,
    crop_weights,
    image_px_per_token,
    intersect_xyxy,
    magnification,
    nearest_level,
    patch_geometry,
    random_box_xyxy,
    resample_weights,
    rescaled_box_xyxy,
    resized_hw,
    valid_hw,
    valid_tokens,
    visible_box_xyxy,
)

FITS: tuple[Fit, ...] = ("squash", "crop", "pad")

EIGHTHS = st.integers(0, 8)


def teacher_geometry(fit: Fit, *, resize_px: int | None = None) -> ViewGeometry:
    """48 x 48 pixels in patches of 8: a 6 x 6 grid."""
    return patch_geometry(48, 8, fit=fit, interpolation="bicubic", resize_px=resize_px)


# ---------------------------------------------------------------- resampling


def one_axis(lo: float, hi: float, num_in: int, num_out: int) -> np.ndarray:
    weights, _ = resample_weights(
        np.array([lo]), np.array([hi]), np.array([0.0]), np.array([float(num_in)]), num_in=num_in, num_out=num_out
    )
    return weights[0]


@st.composite
def intervals(draw: st.DrawFn, num_in: int) -> tuple[float, float]:
    """Part of an axis, in steps of 1/16: PIL keeps a box in float32, and these are exact there."""
    lo = draw(st.integers(0, 16 * num_in - 4))
    return lo / 16, draw(st.integers(lo + 4, 16 * num_in)) / 16


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_sampling_equals_pil_resize_with_a_box(data: st.DataObject) -> None:
    grid_h, grid_w, out_h, out_w = (data.draw(st.integers(1, 20)) for _ in range(4))
    (y0, y1), (x0, x1) = data.draw(intervals(grid_h)), data.draw(intervals(grid_w))
    feature = np.random.default_rng(data.draw(st.integers(0, 99))).normal(size=(grid_h, grid_w)).astype(np.float32)
    expected = Image.fromarray(feature).resize((out_w, out_h), Image.Resampling.BILINEAR, box=(x0, y0, x1, y1))
    sampled = one_axis(y0, y1, grid_h, out_h) @ feature @ one_axis(x0, x1, grid_w, out_w).T
    np.testing.assert_allclose(sampled, np.asarray(expected), atol=2e-5)


@settings(max_examples=80, deadline=None)
@given(
    lo=st.floats(-30, 30),
    length=st.floats(0.01, 60),
    num_in=st.integers(1, 40),
    num_out=st.integers(1, 40),
    valid=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_rows_sum_to_one_wherever_the_interval_lies(
    lo: float, length: float, num_in: int, num_out: int, valid: tuple[float, float]
) -> None:
    valid_lo, valid_hi = sorted(valid)
    weights, _ = resample_weights(
        np.array([lo]),
        np.array([lo + length]),
        np.array([valid_lo * num_in]),
        np.array([valid_hi * num_in]),
        num_in=num_in,
        num_out=num_out,
    )
    np.testing.assert_allclose(weights.sum(axis=2), 1.0, atol=1e-5)
    assert (weights >= 0).all()


def test_sampling_a_grid_at_itself_changes_nothing() -> None:
    np.testing.assert_array_equal(one_axis(0, 7, 7, 7), np.eye(7, dtype=np.float32))


def test_an_interval_outside_the_valid_part_repeats_the_nearest_valid_cell() -> None:
    weights, valid = resample_weights(
        np.array([-4.0]), np.array([-1.0]), np.array([2.0]), np.array([5.0]), num_in=8, num_out=3
    )
    np.testing.assert_array_equal(weights[0], np.eye(8, dtype=np.float32)[[2, 2, 2]])
    assert not valid.any()


def test_a_box_without_area_is_refused() -> None:
    with pytest.raises(ConfigError, match="a crop box has no area"):
        one_axis(3.0, 3.0, 8, 4)


# ---------------------------------------------------------------- ramps

Mutation = Callable[[CropWeights], CropWeights]

LEVELS_OFF = 1.0
"""Allowed distance of a target from the ramp, of 255 levels across the image: rounding to 8 bits, twice."""


def ramp_image(image_hw: tuple[int, int]) -> Image.Image:
    """Red says how far right a pixel's centre is, green how far down, from 0 to 255 across the image."""
    h, w = image_hw
    across = np.broadcast_to((np.arange(w) + 0.5)[None, :] * 255 / w, (h, w))
    down = np.broadcast_to((np.arange(h) + 0.5)[:, None] * 255 / h, (h, w))
    return Image.fromarray(np.stack([across, down, 0 * down], axis=-1).round().astype(np.uint8))


def colours_at_token_centres(image_hw: tuple[int, int], geometry: ViewGeometry) -> np.ndarray:
    """(h, w, 2): what a teacher would say that reports the colour at each token's centre, between two pixels."""
    pixels = view_pixels(ramp_image(image_hw), geometry)[..., :2].astype(np.float64)
    centres = (geometry.offset_px + geometry.stride_px * np.arange(geometry.grid_hw[0])).astype(int)
    doubled = pixels[centres] + pixels[centres - 1]
    return (doubled[:, centres] + doubled[:, centres - 1]) / 4


def off_the_ramp(
    image_hw: tuple[int, int],
    box: BoxXYXY,
    seen: ViewGeometry,
    *,
    assumed: ViewGeometry | None = None,
    assumed_box: BoxXYXY | None = None,
    mutate: Mutation = lambda weights: weights,
) -> float:
    """Largest distance, in levels, between targets under a crop and the ramp at the crop's own token centres.

    The image goes to the teacher as it does in a build; nothing here uses the code's own crop formulas. Only tokens
    between the centres of outermost teacher tokens count: beyond them a target repeats the nearest one.
    assumed, assumed_box, mutate: what the sampling is told instead of the truth.
    """
    (h, w), (x0, y0, x1, y1), out = image_hw, box, 5
    feature = colours_at_token_centres(image_hw, seen)
    weights = mutate(crop_weights([assumed_box or box], [image_hw], assumed or seen, out_hw=(out, out)))
    targets = np.einsum("ij,jwc,kw->ikc", weights.rows[0], feature, weights.columns[0])
    steps = (np.arange(out) + 0.5) / out
    across, down = (x0 + steps * (x1 - x0)) * 255 / w, (y0 + steps * (y1 - y0)) * 255 / h
    shown_h, shown_w = (int(limit - seen.offset_px) // int(seen.stride_px) for limit in valid_hw(image_hw, seen))
    inside_x = (across >= feature[0, 0, 0]) & (across <= feature[0, shown_w, 0])
    inside_y = (down >= feature[0, 0, 1]) & (down <= feature[shown_h, 0, 1])
    assert np.outer(inside_y, inside_x).any(), "this crop compares nothing"
    wrong_x = np.abs(targets[:, :, 0] - across[None, :])[np.ix_(inside_y, inside_x)]
    wrong_y = np.abs(targets[:, :, 1] - down[:, None])[np.ix_(inside_y, inside_x)]
    return float(max(wrong_x.max(), wrong_y.max()))


SIZES_HW = ((48, 48), (97, 131), (133, 71), (61, 40), (200, 203))


def crop_of(image_hw: tuple[int, int], geometry: ViewGeometry) -> BoxXYXY:
    """A crop that is not square, not centred, and enlarges the map, in the part that the teacher saw."""
    x0, y0, x1, y1 = visible_box_xyxy(image_hw, geometry)
    w, h = x1 - x0, y1 - y0
    return (x0 + 0.21 * w, y0 + 0.13 * h, x0 + 0.72 * w, y0 + 0.83 * h)


@pytest.mark.parametrize("image_hw", SIZES_HW)
@pytest.mark.parametrize(
    "geometry",
    [
        teacher_geometry("squash"),
        teacher_geometry("crop"),
        teacher_geometry("crop", resize_px=55),
        teacher_geometry("pad"),
    ],
    ids=["squash", "crop", "crop-of-larger", "pad"],
)
def test_a_ramp_sampled_under_a_crop_is_the_ramp_at_the_crops_token_centres(
    geometry: ViewGeometry, image_hw: tuple[int, int]
) -> None:
    assert off_the_ramp(image_hw, crop_of(image_hw, geometry), geometry) < LEVELS_OFF


@settings(max_examples=60, deadline=None)
@given(
    fit=st.sampled_from(FITS),
    h=st.integers(30, 230),
    w=st.integers(30, 230),
    corner=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
    size=st.tuples(st.floats(0.3, 0.5), st.floats(0.3, 0.5)),
)
def test_ramps_survive_any_enlarging_crop(
    fit: Fit, h: int, w: int, corner: tuple[float, float], size: tuple[float, float]
) -> None:
    geometry = teacher_geometry(fit)
    limits = valid_hw((h, w), geometry)
    assume(min(limits) >= 20 and all((limit - 4) % 8 > 1 for limit in limits))  # the last token shows no padding
    x0, y0, x1, y1 = visible_box_xyxy((h, w), geometry)
    left, top = x0 + corner[0] * (x1 - x0), y0 + corner[1] * (y1 - y0)
    box = (left, top, left + size[0] * (x1 - x0), top + size[1] * (y1 - y0))
    assert off_the_ramp((h, w), box, geometry) < LEVELS_OFF


@pytest.mark.parametrize("image_hw", SIZES_HW)
@pytest.mark.parametrize("fit", FITS)
def test_the_ramp_check_fails_for_wrong_geometry(fit: Fit, image_hw: tuple[int, int]) -> None:
    """What the check above is worth: half an input pixel, swapped axes and a mirrored box do not pass it."""
    geometry = teacher_geometry(fit)
    box = crop_of(image_hw, geometry)

    def swap_axes(weights: CropWeights) -> CropWeights:
        return replace(weights, rows=weights.columns, columns=weights.rows)

    half_a_pixel = replace(geometry, offset_px=geometry.offset_px + 0.5)
    mirrored = (image_hw[1] - box[2], box[1], image_hw[1] - box[0], box[3])
    assert off_the_ramp(image_hw, box, geometry, assumed=half_a_pixel) > LEVELS_OFF
    assert off_the_ramp(image_hw, box, geometry, mutate=swap_axes) > LEVELS_OFF
    assert off_the_ramp(image_hw, box, geometry, assumed_box=mirrored) > LEVELS_OFF


@pytest.mark.parametrize("other", FITS)
@pytest.mark.parametrize("fit", FITS)
def test_the_ramp_check_fails_for_another_fit(fit: Fit, other: Fit) -> None:
    geometry, image_hw = teacher_geometry(fit), (97, 131)
    distance = off_the_ramp(image_hw, crop_of(image_hw, geometry), geometry, assumed=teacher_geometry(other))
    assert (distance > LEVELS_OFF) == (fit != other)


@settings(max_examples=60, deadline=None)
@given(num_out=st.integers(1, 5), shrink=st.integers(2, 4), start=st.integers(8, 15))
def test_shrinking_by_a_whole_number_keeps_a_ramp(num_out: int, shrink: int, start: int) -> None:
    cells = np.arange(50) + 0.5
    weights = one_axis(float(start), float(start + num_out * shrink), 50, num_out)
    np.testing.assert_allclose(weights @ cells, start + (np.arange(num_out) + 0.5) * shrink, rtol=1e-5)


# ---------------------------------------------------------------- padding


@settings(max_examples=60, deadline=None)
@given(
    h=st.integers(1, 300),
    w=st.integers(1, 300),
    out=st.integers(1, 12),
    corners=st.tuples(*[st.floats(-0.5, 1.5)] * 4),
)
def test_padding_never_leaks_into_a_target(
    h: int, w: int, out: int, corners: tuple[float, float, float, float]
) -> None:
    (x0, x1), (y0, y1) = sorted(corners[:2]), sorted(corners[2:])
    assume(x1 - x0 > 0.01 and y1 - y0 > 0.01)
    geometry = teacher_geometry("pad")
    centres = geometry.offset_px + geometry.stride_px * np.arange(6)
    rows_shown, columns_shown = (centres <= limit for limit in valid_hw((h, w), geometry))
    rows_shown[0] = columns_shown[0] = True  # of a strip thinner than half a token, the first token is all there is
    feature = np.where(rows_shown[:, None] & columns_shown[None, :], 1.0, 1e30)
    box = (x0 * w, y0 * h, x1 * w, y1 * h)
    weights = crop_weights([box], [(h, w)], geometry, out_hw=(out, out))
    np.testing.assert_allclose(weights.rows[0] @ feature @ weights.columns[0].T, 1.0, atol=1e-5)


def test_valid_marks_the_tokens_whose_centre_the_teacher_saw() -> None:
    geometry, image_hw = teacher_geometry("crop"), (50, 100)  # seen: columns 25 to 75
    weights = crop_weights([(0.0, 0.0, 100.0, 50.0)], [image_hw], geometry, out_hw=(2, 10))
    np.testing.assert_array_equal(weights.valid[0, 0], [False] * 2 + [True] * 6 + [False] * 2)
    np.testing.assert_array_equal(weights.valid[0, 0], weights.valid[0, 1])


# ---------------------------------------------------------------- each library's own rounding

IMAGE_SIDE = st.integers(1, 255)


@settings(max_examples=80, deadline=None)
@given(h=IMAGE_SIDE, w=IMAGE_SIDE, resize_px=st.integers(16, 40), cut=st.integers(0, 7))
def test_crop_is_torchvisions_resize_and_centre_crop(h: int, w: int, resize_px: int, cut: int) -> None:
    assume(max(h, w) < 12 * min(h, w))
    geometry = ViewGeometry(
        fit="crop",
        input_hw=(resize_px - cut, resize_px - cut),
        resize_px=resize_px,
        interpolation="bilinear",
        grid_hw=(1, 1),
        stride_px=1.0,
        offset_px=0.5,
    )
    resized = Resize(resize_px)(Image.new("L", (w, h)))
    assert resized_hw((h, w), geometry) == (resized.height, resized.width)
    assume(max(resized.size) < 256)
    columns, rows = np.meshgrid(np.arange(resized.width, dtype=np.uint8), np.arange(resized.height, dtype=np.uint8))
    y, x = (CenterCrop(resize_px - cut)(Image.fromarray(place)).getpixel((0, 0)) for place in (rows, columns))
    assert crop_offset_yx(resized_hw((h, w), geometry), geometry) == (y, x)
    x0, y0, x1, y1 = visible_box_xyxy((h, w), geometry)
    assert (x0, y0) == pytest.approx((x * w / resized.width, y * h / resized.height))
    seen_px = resize_px - cut
    assert (x1 - x0, y1 - y0) == pytest.approx((seen_px * w / resized.width, seen_px * h / resized.height))


@settings(max_examples=150, deadline=None)
@given(h=st.integers(1, 5000), w=st.integers(1, 5000), long_side=st.sampled_from([64, 256, 1000, 1024]))
def test_pad_is_segment_anythings_resize_longest_side(h: int, w: int, long_side: int) -> None:
    expected = ResizeLongestSide.get_preprocess_shape(h, w, long_side)
    assume(min(expected) > 0)  # segment-anything makes nothing of a strip; we keep one pixel
    geometry = replace(teacher_geometry("pad"), input_hw=(long_side, long_side), resize_px=long_side)
    assert valid_hw((h, w), geometry) == resized_hw((h, w), geometry) == expected
    assert visible_box_xyxy((h, w), geometry) == pytest.approx((0, 0, w, h))


@pytest.mark.parametrize("image_hw", SIZES_HW)
def test_squash_shows_the_whole_image_in_the_whole_input(image_hw: tuple[int, int]) -> None:
    geometry = teacher_geometry("squash")
    assert resized_hw(image_hw, geometry) == valid_hw(image_hw, geometry) == (48, 48)
    assert visible_box_xyxy(image_hw, geometry) == (0, 0, image_hw[1], image_hw[0])


def test_a_thin_strip_keeps_at_least_one_pixel_when_padded() -> None:
    assert valid_hw((1, 4000), teacher_geometry("pad")) == (1, 48)


def test_a_strip_that_would_not_fit_in_memory_is_an_image_error_with_both_sizes() -> None:
    with pytest.raises(ImageError, match="2 x 80000 pixels is too long and thin: resized it would be 48 x 1920000"):
        resized_hw((80000, 2), teacher_geometry("crop"))


# ---------------------------------------------------------------- boxes


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    x0=st.floats(0, 100),
    y0=st.floats(0, 100),
    w=st.floats(1, 300),
    h=st.floats(1, 300),
    area=st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)),
    ratio=st.floats(1, 3),
)
def test_a_random_box_stays_inside(
    seed: int, x0: float, y0: float, w: float, h: float, area: tuple[float, float], ratio: float
) -> None:
    within = (x0, y0, x0 + w, y0 + h)
    low, high = sorted(area)
    box = random_box_xyxy(np.random.default_rng(seed), within, area=(low, high), ratio=(1 / ratio, ratio))
    assert x0 <= box[0] < box[2] <= x0 + w + 1e-9 * (x0 + w)
    assert y0 <= box[1] < box[3] <= y0 + h + 1e-9 * (y0 + h)
    assert (box[2] - box[0]) * (box[3] - box[1]) <= high * w * h * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 0.7), w=st.floats(1, 300), h=st.floats(1, 300))
def test_a_random_box_that_fits_has_exactly_the_asked_area(seed: int, share: float, w: float, h: float) -> None:
    box = random_box_xyxy(np.random.default_rng(seed), (5, 7, 5 + w, 7 + h), area=(share, share), ratio=(0.75, 4 / 3))
    assert (box[2] - box[0]) * (box[3] - box[1]) == pytest.approx(share * w * h)
    relative_ratio = (box[2] - box[0]) / w / ((box[3] - box[1]) / h)
    assert 0.75 - 1e-6 <= relative_ratio <= 4 / 3 + 1e-6


def test_random_areas_are_uniform_between_the_two_shares() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([random_box_xyxy(rng, (0, 0, 10, 20), area=(0.2, 0.6), ratio=(0.9, 1.1)) for _ in range(4000)])
    shares = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 200
    np.testing.assert_allclose(np.quantile(shares, [0, 0.25, 0.5, 0.75, 1]), [0.2, 0.3, 0.4, 0.5, 0.6], atol=0.015)


def test_a_whole_share_is_the_whole_box() -> None:
    box = random_box_xyxy(np.random.default_rng(3), (1, 2, 11, 7), area=(1, 1), ratio=(1, 1))
    assert box == pytest.approx((1, 2, 11, 7))


@settings(max_examples=60, deadline=None)
@given(x=st.tuples(EIGHTHS, EIGHTHS), y=st.tuples(EIGHTHS, EIGHTHS), fit=st.sampled_from(FITS))
def test_kept_share_is_counted_in_pixels(x: tuple[int, int], y: tuple[int, int], fit: Fit) -> None:
    (left, right), (top, bottom) = sorted(x), sorted(y)
    assume(left < right and top < bottom)
    h, w = 16, 32
    geometry = ViewGeometry(
        fit=fit, input_hw=(16, 16), resize_px=16, interpolation="bilinear", grid_hw=(2, 2), stride_px=8.0, offset_px=4.0
    )
    seen = np.zeros((h, w), bool)
    seen[:, 8:24] = True  # what a centre crop shows of an image twice as wide as high
    seen |= fit != "crop"
    cropped = np.zeros((h, w), bool)
    cropped[2 * top : 2 * bottom, 4 * left : 4 * right] = True
    box = (4.0 * left, 2.0 * top, 4.0 * right, 2.0 * bottom)
    kept = crop_weights([box], [(h, w)], geometry, out_hw=(2, 2)).coverage[0]
    assert kept == pytest.approx((seen & cropped).sum() / seen.sum())


def test_the_common_part_of_boxes_is_the_largest_corner_and_the_smallest() -> None:
    assert intersect_xyxy([(0, 3, 10, 9), (2, 1, 12, 8)]) == (2, 3, 10, 8)


# ---------------------------------------------------------------- geometry as data


def test_geometry_survives_json() -> None:
    geometry = teacher_geometry("crop", resize_px=55)
    assert from_json(ViewGeometry, json.loads(json.dumps(geometry.to_json()))) == geometry


def test_a_size_that_is_no_multiple_of_the_patch_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="input size 225 px is not a multiple of the patch, 14 px; nearest: 224"):
        patch_geometry(225, 14, fit="crop", interpolation="bicubic")


def test_an_unknown_fit_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="fit 'stretch' is none of squash, crop, pad"):
        patch_geometry(32, 8, fit="stretch", interpolation="bicubic")  # type: ignore[arg-type]


def test_geometry_without_pixels_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one pixel and one token"):
        replace(teacher_geometry("squash"), stride_px=0.0)


def test_tokens_are_valid_where_their_centre_shows_the_image() -> None:
    geometry = patch_geometry(32, 8, fit="pad", interpolation="bilinear")
    # 32 x 20 pixels of image: of the columns, centred at 4, 12, 20 and 28, the first three show it.
    np.testing.assert_array_equal(valid_tokens((32, 20), geometry), [[True, True, True, False]] * 4)
    np.testing.assert_array_equal(valid_tokens((64, 38), geometry), [[True, True, False, False]] * 4)
    assert valid_tokens((5, 90), patch_geometry(32, 8, fit="crop", interpolation="bilinear")).all()


@pytest.mark.parametrize(
    ("fit", "image_hw", "expected"),
    [("squash", (96, 96), 0.5), ("squash", (48, 192), 0.5), ("crop", (96, 200), 0.5), ("pad", (96, 200), 0.24)],
)
def test_magnification_is_input_pixels_per_image_pixel(fit: Fit, image_hw: tuple[int, int], expected: float) -> None:
    geometry = teacher_geometry(fit)  # 48 pixels, patches of 8
    assert magnification(image_hw, geometry) == pytest.approx(expected, rel=0.01)
    assert image_px_per_token(image_hw, geometry) == pytest.approx(8 / expected, rel=0.01)


def test_the_smaller_the_crop_the_larger_the_level_that_fits() -> None:
    levels = [patch_geometry(size, 8, fit="crop", interpolation="bicubic") for size in (48, 96, 192)]
    for share, level in ((1.0, 0), (0.75, 0), (0.65, 1), (0.5, 1), (0.3, 2), (0.05, 2)):
        side = 400 * share
        assert nearest_level((7, 3, 7 + side, 3 + side), (400, 500), (48, 48), levels) == level
    # A student that looks closer itself needs a larger level of the same crop.
    assert nearest_level((0, 0, 400, 400), (400, 500), (96, 96), levels) == 1


def test_of_two_levels_as_near_the_smaller_is_taken() -> None:
    levels = [patch_geometry(size, 8, fit="squash", interpolation="bicubic") for size in (48, 48)]
    assert nearest_level((0, 0, 50, 50), (50, 50), (48, 48), levels) == 0


@given(h=IMAGE_SIDE, w=IMAGE_SIDE, kept=st.integers(1, 30), edges=st.tuples(*[st.floats(0, 1)] * 4))
def test_a_box_in_a_smaller_copy_keeps_its_place(h: int, w: int, kept: int, edges: tuple[float, ...]) -> None:
    box = (edges[0] * w, edges[1] * h, edges[2] * w, edges[3] * h)
    assert rescaled_box_xyxy(box, (h, w), (h, w)) == box
    x0, y0, x1, y1 = rescaled_box_xyxy(box, (h, w), (kept, 2 * kept))
    np.testing.assert_allclose((x0 / 2, y0, x1 / 2, y1), np.array(edges) * kept, atol=1e-9)
    assert max(x1, y1) <= 2 * kept
