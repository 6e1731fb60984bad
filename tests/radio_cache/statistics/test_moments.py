from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from radio_cache.errors import ShapeError
from radio_cache.statistics.moments import Moments, cross_validated, merge_all, power_sums
from radio_cache.statistics.phi_s import pca_whiten


def _tokens(count: int, channels: int, seed: int) -> NDArray[np.float64]:
    """Correlated channels of very different scales, far from zero: where naive sums of squares lose their digits."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(count, channels)) @ rng.normal(size=(channels, channels))
    return mixed * 10.0 ** rng.uniform(-3, 3, channels) + rng.normal(size=channels) * 1000


def _assert_close(one: Moments, other: Moments, tolerance: float) -> None:
    """Relative to the standard deviations, plus the rounding of the mean's own size."""
    assert one.count == other.count
    sigma = np.sqrt(np.diag(other.covariance)) + 1e-12 * (1 + np.abs(other.mean))
    assert np.abs(one.mean - other.mean).max() <= tolerance * (1 + np.abs(other.mean).max())
    limit = tolerance * other.count * np.outer(sigma, sigma) + 1e-9 * other.count * sigma.min() ** 2
    assert (np.abs(one.scatter - other.scatter) <= limit).all()


def test_moments_agree_with_numpy() -> None:
    tokens = _tokens(500, 6, 0)
    moments = Moments.of(tokens)
    np.testing.assert_allclose(moments.mean, tokens.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(moments.covariance, np.cov(tokens.T, bias=True), rtol=1e-10, atol=1e-12)
    assert moments.count == 500
    assert moments.channels == 6


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 300), st.integers(1, 12), st.integers(0, 10_000), st.data())
def test_two_halves_are_the_whole(count: int, channels: int, seed: int, data: st.DataObject) -> None:
    tokens = _tokens(count, channels, seed)
    cut = data.draw(st.integers(0, count))
    halves = Moments.of(tokens[:cut]).merge(Moments.of(tokens[cut:]))
    _assert_close(halves, Moments.of(tokens), 1e-10)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(1, 8), st.integers(0, 10_000))
def test_the_order_of_merging_does_not_matter(pieces: int, channels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [Moments.of(rng.normal(3, 2, size=(int(rng.integers(0, 50)), channels))) for _ in range(pieces)]
    shuffled = [parts[i] for i in rng.permutation(pieces)]
    forwards, backwards = reduce(Moments.merge, parts), reduce(lambda a, b: b.merge(a), shuffled)
    assert forwards.count == backwards.count
    np.testing.assert_allclose(forwards.mean, backwards.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(forwards.scatter, backwards.scatter, rtol=1e-12, atol=1e-12 * max(forwards.count, 1) * 4)


def test_nothing_merges_into_anything() -> None:
    moments = Moments.of(_tokens(20, 3, 1))
    for merged in (
        moments.merge(Moments.empty(3)),
        Moments.empty(3).merge(moments),
        moments.merge(Moments.of(np.zeros((0, 3)))),
    ):
        np.testing.assert_array_equal(merged.mean, moments.mean)
        np.testing.assert_array_equal(merged.scatter, moments.scatter)
        assert merged.count == 20
    assert Moments.empty(3).merge(Moments.empty(3)).covariance.tolist() == np.zeros((3, 3)).tolist()


def test_who_merges_whom_does_not_change_a_bit() -> None:
    one, other = Moments.of(_tokens(20, 3, 1)), Moments.of(_tokens(33, 3, 2))
    np.testing.assert_array_equal(one.merge(other).mean, other.merge(one).mean)
    np.testing.assert_array_equal(one.merge(other).scatter, other.merge(one).scatter)


def test_a_large_mean_does_not_eat_a_small_variance() -> None:
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(1000, 2))
    far = Moments.of(noise[:400] + 1e6).merge(Moments.of(noise[400:] + 1e6))
    np.testing.assert_allclose(far.covariance, Moments.of(noise).covariance, rtol=0, atol=1e-8)


def test_the_scatter_is_symmetric_and_half_precision_counts_in_float64() -> None:
    tokens = np.random.default_rng(3).normal(size=(4000, 5)).astype(np.float16) * np.float16(100)
    moments = Moments.of(tokens)
    np.testing.assert_array_equal(moments.scatter, moments.scatter.T)
    np.testing.assert_allclose(moments.mean, tokens.astype(np.float64).mean(axis=0), rtol=1e-12)
    assert np.isfinite(moments.scatter).all()


def test_principal_axes_diagonalise_the_covariance_strongest_first() -> None:
    moments = Moments.of(_tokens(400, 7, 5))
    eigenvalues, axes = moments.principal_axes()
    np.testing.assert_allclose(axes.T @ axes, np.eye(7), atol=1e-12)
    np.testing.assert_allclose((axes * eigenvalues) @ axes.T, moments.covariance, rtol=1e-9, atol=1e-9 * eigenvalues[0])
    assert (np.diff(eigenvalues) <= 0).all()
    assert (axes[np.abs(axes).argmax(axis=0), np.arange(7)] > 0).all()


def test_directions_without_variance_have_eigenvalue_zero_or_rounding_but_never_less() -> None:
    eigenvalues, _ = Moments.of(np.random.default_rng(6).normal(size=(5, 12))).principal_axes()
    assert (eigenvalues >= 0).all()
    assert eigenvalues[4:].max() < 1e-12


def test_the_tokens_are_left_alone() -> None:
    tokens = _tokens(10, 3, 4)
    before = tokens.copy()
    Moments.of(tokens)
    np.testing.assert_array_equal(tokens, before)


def test_shapes_that_cannot_be_are_named() -> None:
    with pytest.raises(ShapeError, match=r"\(2, 3, 4\)"):
        Moments.of(np.zeros((2, 3, 4)))
    with pytest.raises(ShapeError, match="3 and of 4 channels"):
        Moments.empty(3).merge(Moments.empty(4))
    with pytest.raises(ShapeError, match=r"\(3, 4\)"):
        Moments(1, np.zeros(3), np.zeros((3, 4)))


def test_power_sums_are_exact_where_half_precision_would_overflow() -> None:
    features = np.full((3, 5, 2), 1000, np.float16)
    assert power_sums(features).tolist() == [[15_000, 15_000], [15_000_000, 15_000_000]]


def test_cross_validated_eigenvalues_whiten_tokens_of_other_images() -> None:
    """Forty channels and 160 tokens: the sample's own eigenvalues are far too small where they are small."""
    rng = np.random.default_rng(3)
    mix = np.linalg.qr(rng.normal(size=(40, 40)))[0] * np.geomspace(5, 0.2, 40)
    parts = [Moments.of(rng.normal(size=(20, 40)) @ mix.T) for _ in range(8)]
    others = rng.normal(size=(20_000, 40)) @ mix.T
    variances = {
        name: float(pca_whiten(moments).forward(others).var(axis=0).mean())
        for name, moments in (("own", merge_all(parts)), ("others'", cross_validated(parts)))
    }
    assert variances["own"] > 1.2
    assert variances["others'"] == pytest.approx(1, abs=0.05)


def test_cross_validation_keeps_mean_trace_and_axes() -> None:
    rng = np.random.default_rng(4)
    parts = [Moments.of(rng.normal(size=(30, 6)) * np.arange(1, 7)) for _ in range(4)]
    whole, shrunk = merge_all(parts), cross_validated([Moments.empty(6), *parts])
    assert shrunk.count == whole.count
    np.testing.assert_array_equal(shrunk.mean, whole.mean)
    assert np.trace(shrunk.covariance) == pytest.approx(np.trace(whole.covariance))
    turned = whole.principal_axes()[1].T @ shrunk.covariance @ whole.principal_axes()[1]
    np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-9)
