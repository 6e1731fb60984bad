"""Extra views: where they are drawn, and that their maps are sampled at the right place."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from radio_cache.errors import ConfigError
from radio_cache.format.strict_json import from_json
from radio_cache.geometry.crops import BoxXYXY, crop_weights, patch_geometry
from radio_cache.geometry.views import View, ViewSampling, box_in_view, draw_view, whole_view
from radio_cache.images.decode import cut_view

SAMPLING = ViewSampling(seed=3, area=(0.2, 0.9), ratio=(3 / 4, 4 / 3), flip_share=0.5)
SIDES = st.integers(1, 400)


@given(h=SIDES, w=SIDES, row=st.integers(0, 10**9), number=st.integers(1, 5))
def test_a_view_lies_in_the_image_and_has_at_least_a_pixel(h: int, w: int, row: int, number: int) -> None:
    x0, y0, x1, y1 = draw_view(SAMPLING, row, number, (h, w)).box_xyxy
    assert 0 <= x0 < x1 <= w
    assert 0 <= y0 < y1 <= h


def test_views_are_drawn_as_asked() -> None:
    views = [draw_view(SAMPLING, row, 1, (300, 400)) for row in range(400)]
    shares = np.array([view.image_hw[0] * view.image_hw[1] / (300 * 400) for view in views])
    ratios = np.array([view.image_hw[1] / view.image_hw[0] * 300 / 400 for view in views])
    assert 0.19 < shares.min() < 0.25
    assert 0.8 < shares.max() < 0.91
    assert 0.73 < ratios.min() < 0.8
    assert 1.25 < ratios.max() < 1.36
    assert 0.4 < np.mean([view.flipped for view in views]) < 0.6


def test_a_view_follows_from_seed_row_and_number_alone() -> None:
    one = draw_view(SAMPLING, 7, 2, (100, 90))
    assert draw_view(SAMPLING, 7, 2, (100, 90)) == one
    other = ViewSampling(seed=4, area=(0.2, 0.9), ratio=(3 / 4, 4 / 3), flip_share=0.5)
    assert (
        len(
            {
                one,
                draw_view(SAMPLING, 8, 2, (100, 90)),
                draw_view(SAMPLING, 7, 1, (100, 90)),
                draw_view(other, 7, 2, (100, 90)),
            }
        )
        == 4
    )


def test_view_0_is_the_whole_image_and_others_need_a_rule() -> None:
    assert draw_view(SAMPLING, 5, 0, (20, 30)) == draw_view(None, 5, 0, (20, 30)) == whole_view((20, 30))
    assert whole_view((20, 30)) == View((0, 0, 30, 20), flipped=False)
    with pytest.raises(ConfigError, match="view 1 is asked for, and how views are drawn is not said"):
        draw_view(None, 5, 1, (20, 30))


@pytest.mark.parametrize(
    "bad",
    [
        {"area": (0.0, 1.0)},
        {"area": (0.5, 0.2)},
        {"area": (0.5, 1.5)},
        {"ratio": (2.0, 1.0)},
        {"flip_share": 2.0},
        {"seed": -1},
    ],
)
def test_impossible_ways_to_draw_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="no views can be drawn this way"):
        from_json(
            ViewSampling,
            json.loads(json.dumps({"seed": 0, "area": (0.2, 0.9), "ratio": (0.7, 1.4), "flip_share": 0.0, **bad})),
        )


@pytest.mark.parametrize("flipped", [False, True])
def test_a_crop_sampled_from_a_views_map_shows_what_the_crop_shows(flipped: bool) -> None:
    """Ramps: a teacher whose features are the coordinates of the image, seen through a view, mirrored or not."""
    view = View((40, 20, 296, 212), flipped)
    geometry = patch_geometry(64, 8, fit="squash", interpolation="bilinear")
    h, w = view.image_hw
    ys, xs = (np.arange(8) + 0.5) / 8 * h + 20, (np.arange(8) + 0.5) / 8 * w + 40
    ramp = np.stack(np.meshgrid(ys, xs[::-1] if flipped else xs, indexing="ij"), axis=-1)
    crop: BoxXYXY = (88.0, 60.0, 248.0, 180.0)
    weights = crop_weights([box_in_view(crop, view)], [view.image_hw], geometry, out_hw=(5, 6))
    sampled = np.einsum("oh,hwc,pw->opc", weights.rows[0], ramp, weights.columns[0])
    x_centres = 88 + (np.arange(6) + 0.5) / 6 * 160
    np.testing.assert_allclose(
        sampled[..., 0], np.repeat(60 + (np.arange(5) + 0.5)[:, None] / 5 * 120, 6, 1), atol=1e-3
    )
    np.testing.assert_allclose(sampled[0, :, 1], x_centres[::-1] if flipped else x_centres, atol=1e-3)
    assert weights.valid.all()
    assert weights.coverage[0] == pytest.approx(160 * 120 / (h * w))


@pytest.mark.parametrize("flipped", [False, True])
def test_a_box_in_a_views_frame_has_the_pixels_it_has_in_the_image(flipped: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    image, view = Image.fromarray(noise), View((10, 5, 45, 33), flipped)
    inside = box_in_view((15, 10, 30, 20), view)
    cut = np.asarray(cut_view(image, view).crop(inside))
    np.testing.assert_array_equal(cut[:, ::-1] if flipped else cut, noise[10:20, 15:30])


def test_the_whole_view_of_an_image_is_the_image_itself() -> None:
    image = Image.new("RGB", (30, 20))
    assert cut_view(image, whole_view((20, 30))) is image
