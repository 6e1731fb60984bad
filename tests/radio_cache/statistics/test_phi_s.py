import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from radio_cache.codecs.klt_basis import KltBasis
from radio_cache.codecs.klt_zstd import KltZstd, Layout
from radio_cache.errors import HadamardError, MomentsError, ShapeError
from radio_cache.statistics.hadamard import hadamard
from radio_cache.statistics.moments import Moments
from radio_cache.statistics.phi_s import (
    NORMALISATIONS,
    global_standardise,
    hadamard_whiten,
    pca_whiten,
    phi_s,
    standardise,
    zca_whiten,
)

WIDTHS = (1, 2, 4, 12, 20, 28)


def _tokens(channels: int, seed: int, *, count: int = 600, decades: float = 2.0) -> NDArray[np.float64]:
    """Correlated tokens whose principal directions have deviations over this many decades, and a mean far from zero."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(channels, channels)))[0]
    deviations = 10.0 ** rng.uniform(-decades / 2, decades / 2, channels)
    return (rng.normal(size=(count, channels)) * deviations) @ rotation.T + rng.normal(size=channels) * 5


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(NORMALISATIONS)), st.sampled_from(WIDTHS), st.integers(0, 10_000))
def test_inverse_undoes_forward(name: str, channels: int, seed: int) -> None:
    tokens = _tokens(channels, seed)
    affine = NORMALISATIONS[name](Moments.of(tokens))
    other = _tokens(channels, seed + 1).reshape(6, 100, channels)
    for values in (tokens, other):
        np.testing.assert_allclose(affine.inverse(affine.forward(values)), values, rtol=0, atol=1e-8)
    np.testing.assert_allclose(affine.matrix @ affine.inverse_matrix, np.eye(channels), atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(WIDTHS), st.integers(0, 10_000))
def test_phi_s_gives_every_channel_unit_variance_and_scales_all_directions_alike(channels: int, seed: int) -> None:
    moments = Moments.of(_tokens(channels, seed))
    affine = phi_s(moments)
    after = Moments.of(affine.forward(_tokens(channels, seed)))
    np.testing.assert_allclose(np.diag(after.covariance), 1, rtol=0, atol=1e-9)
    np.testing.assert_allclose(after.mean, 0, atol=1e-9)
    squared_phi = np.trace(moments.covariance) / channels
    np.testing.assert_allclose(affine.matrix @ affine.matrix.T * squared_phi, np.eye(channels), atol=1e-12)


@pytest.mark.parametrize("name", ["pca", "zca", "hadamard"])
@pytest.mark.parametrize("channels", WIDTHS)
def test_whitening_leaves_the_identity_as_covariance(name: str, channels: int) -> None:
    tokens = _tokens(channels, 3)
    after = Moments.of(NORMALISATIONS[name](Moments.of(tokens)).forward(tokens))
    np.testing.assert_allclose(after.covariance, np.eye(channels), atol=1e-8)
    np.testing.assert_allclose(after.mean, 0, atol=1e-8)


def test_the_whitenings_differ_by_a_rotation() -> None:
    tokens = _tokens(12, 4)
    moments = Moments.of(tokens)
    axes = moments.principal_axes()[1]
    pca = pca_whiten(moments).forward(tokens)
    np.testing.assert_allclose(zca_whiten(moments).forward(tokens), pca @ axes.T, atol=1e-9)
    np.testing.assert_allclose(hadamard_whiten(moments).forward(tokens), pca @ hadamard(12).T, atol=1e-9)
    zca = zca_whiten(moments).matrix
    np.testing.assert_allclose(zca, zca.T, atol=1e-9 * np.abs(zca).max())


def test_standardise_leaves_unit_variances_and_the_correlations() -> None:
    tokens = _tokens(12, 5)
    after = standardise(Moments.of(tokens)).forward(tokens)
    np.testing.assert_allclose(np.cov(after.T, bias=True), np.corrcoef(tokens.T), atol=1e-9)


def test_global_standardise_makes_one_distribution_of_all_values() -> None:
    tokens = _tokens(12, 6)
    affine = global_standardise(Moments.of(tokens))
    np.testing.assert_allclose(affine.forward(tokens), (tokens - tokens.mean()) / tokens.std(), atol=1e-10)


def test_phi_s_spreads_what_no_channel_alone_may_hold() -> None:
    """One direction carries nearly all variance, along one channel: afterwards no channel is louder than another."""
    rng = np.random.default_rng(7)
    tokens = rng.normal(size=(4000, 20)) * np.array([1000.0] + [0.1] * 19)
    after = phi_s(Moments.of(tokens)).forward(tokens)
    np.testing.assert_allclose(after.var(axis=0), 1, atol=1e-9)


@pytest.mark.parametrize("layout", ["planes", "bytes", "nibbles"])
def test_the_phi_s_target_of_klt_codes_is_one_hadamard_product(layout: Layout) -> None:
    """step a H q, from gain and integers alone, is PHI-S of the features that the codes decode to."""
    tokens = _tokens(20, 8, count=1600).astype(np.float32).reshape(16, 10, 10, 20)
    moments = Moments.of(tokens.reshape(-1, 20))
    codec = KltZstd(KltBasis.fit(moments), 0.25, layout)
    gains, integers = codec.quantise(codec.basis.forward(tokens))
    steps = codec.step * 2.0 ** (gains / 4)
    target = steps[..., None] * (integers @ hadamard(20).T)
    np.testing.assert_allclose(target, phi_s(moments).forward(codec.decode(codec.encode(tokens))), atol=2e-5)
    off = np.abs(target - phi_s(moments).forward(tokens)).max(axis=-1)
    assert (off < steps / 2 * np.sqrt(20) + 1e-4).all()


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_directions_without_variance_survive_the_way_there_and_back(name: str) -> None:
    rng = np.random.default_rng(9)
    tokens = rng.normal(size=(6, 12))  # rank 5 at most
    tokens[:, 3] = 2.0  # a dead channel
    affine = NORMALISATIONS[name](Moments.of(tokens))
    other = rng.normal(size=(50, 12))
    assert np.isfinite(affine.forward(other)).all()
    np.testing.assert_allclose(affine.inverse(affine.forward(other)), other, atol=1e-9)
    amplified = np.linalg.norm(affine.matrix, 2) * np.sqrt(np.trace(Moments.of(tokens).covariance) / 12)
    assert amplified <= 1000 * (1 + 1e-9)


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_tokens_without_variance_or_without_a_number_are_refused(name: str) -> None:
    with pytest.raises(MomentsError, match="no channel varies over the 5 sampled tokens"):
        NORMALISATIONS[name](Moments.of(np.ones((5, 4))))
    with pytest.raises(MomentsError, match="over the 0 sampled tokens"):
        NORMALISATIONS[name](Moments.empty(4))
    with pytest.raises(MomentsError, match="NaN or infinity"):
        NORMALISATIONS[name](Moments.of(np.array([[1.0, np.nan], [2.0, 3.0]])))


@pytest.mark.parametrize("name", ["hadamard", "phi-s"])
def test_a_width_without_a_hadamard_matrix_is_refused(name: str) -> None:
    with pytest.raises(HadamardError, match="order 6: none exists"):
        NORMALISATIONS[name](Moments.of(_tokens(6, 0)))


def test_another_number_of_channels_is_refused() -> None:
    affine = phi_s(Moments.of(_tokens(4, 0)))
    with pytest.raises(ShapeError, match=r"4 channels, applied to values of shape \(3, 5\)"):
        affine.forward(np.zeros((3, 5)))
    with pytest.raises(ShapeError, match=r"\(\)"):
        affine.inverse(np.zeros(()))


def test_half_precision_features_are_normalised_in_float64() -> None:
    tokens = (_tokens(4, 1) * 1000).astype(np.float16)
    affine = phi_s(Moments.of(tokens))
    assert affine.forward(tokens).dtype == np.float64
    np.testing.assert_allclose(affine.inverse(affine.forward(tokens)), tokens.astype(np.float64), atol=1e-6)
