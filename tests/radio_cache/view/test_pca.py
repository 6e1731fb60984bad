"""Colours of feature maps: comparable, deterministic, robust."""

import io

import numpy as np
import pytest
from PIL import Image

from radio_cache.errors import ShapeError
from radio_cache.view import PcaColours, png_bytes


def maps(seed: int = 0, channels: int = 16) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(4, channels)) * np.array([8, 4, 2, 1])[:, None]
    return (rng.normal(size=(3, 5, 7, 4)) @ mixing + rng.normal(size=channels) * 50).astype(np.float32)


def test_first_component_is_the_direction_of_largest_variance() -> None:
    features = maps()
    fitted = PcaColours.fit(features)
    centred = features.reshape(-1, 16) - features.reshape(-1, 16).mean(axis=0)
    _, singular, right = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(fitted.basis.T @ right[:3].T), np.eye(3), atol=1e-4)
    np.testing.assert_allclose(fitted.basis.T @ fitted.basis, np.eye(3), atol=1e-9)
    assert singular[0] > singular[1] > singular[2]


def test_signs_do_not_depend_on_the_order_of_the_maps() -> None:
    features = maps()
    np.testing.assert_allclose(PcaColours.fit(features).basis, PcaColours.fit(features[::-1]).basis, atol=1e-9)


def test_largest_entry_of_every_direction_is_positive() -> None:
    for seed in range(5):
        basis = PcaColours.fit(maps(seed)).basis
        assert (basis[np.abs(basis).argmax(axis=0), [0, 1, 2]] > 0).all()


def test_colours_span_the_range_and_equal_features_get_equal_colours() -> None:
    features = maps()
    fitted = PcaColours.fit(features)
    colours = np.stack([fitted.colours(one) for one in features])
    assert colours.shape == (3, 5, 7, 3)
    assert colours.dtype == np.uint8
    assert (colours.reshape(-1, 3).min(axis=0) == 0).all()
    assert (colours.reshape(-1, 3).max(axis=0) == 255).all()
    np.testing.assert_array_equal(fitted.colours(features[0][::-1]), colours[0][::-1])


def test_one_outlier_token_does_not_grey_out_the_rest() -> None:
    features = np.random.default_rng(1).normal(size=(1, 20, 20, 8))
    features[0, 0, 0] *= 1000
    colours = PcaColours.fit(features).colours(features[0])
    assert colours[1:, :, 1].std() > 40


def test_fewer_than_three_directions_leave_the_other_colours_grey() -> None:
    flat = np.ones((2, 3, 3, 5), dtype=np.float32)
    assert (PcaColours.fit(flat).colours(flat[0]) == 128).all()
    line = np.linspace(-1, 1, 9).reshape(1, 3, 3, 1) * np.ones(5)
    colours = PcaColours.fit(line).colours(line[0])
    assert set(np.unique(colours[..., 1:])) == {128}
    assert len(np.unique(colours[..., 0])) == 9


def test_two_channels_are_enough() -> None:
    features = maps(channels=2)
    assert PcaColours.fit(features).colours(features[0]).shape == (5, 7, 3)


def test_wrong_width_and_bad_values_are_refused() -> None:
    fitted = PcaColours.fit(maps())
    with pytest.raises(ShapeError, match="16 channels"):
        fitted.colours(np.zeros((2, 2, 3)))
    with pytest.raises(ShapeError, match="at least one token"):
        PcaColours.fit(np.empty((0, 2, 2, 3)))
    with pytest.raises(ShapeError, match="finite"):
        PcaColours.fit(np.full((1, 2, 2, 3), np.nan))


def test_png_keeps_colours() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png_bytes(picture)))), picture)
