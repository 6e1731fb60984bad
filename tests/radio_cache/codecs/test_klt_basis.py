import numpy as np
import pytest

from radio_cache.codecs.klt_basis import KltBasis
from radio_cache.errors import CodecError
from radio_cache.statistics.hadamard import hadamard
from radio_cache.statistics.moments import Moments

RNG = np.random.default_rng(0)
TOKENS = (RNG.normal(size=(4000, 12)) @ RNG.normal(size=(12, 12)) + RNG.normal(size=12) * 5).astype(np.float32)
BASIS = KltBasis.fit(Moments.of(TOKENS))


def test_coordinates_are_uncorrelated_strongest_first_and_of_mean_variance_one() -> None:
    covariance = np.cov(BASIS.forward(TOKENS).T, bias=True)
    variances = np.diag(covariance)
    np.testing.assert_allclose(covariance, np.diag(variances), atol=1e-5)
    assert (np.diff(variances) <= 1e-5).all()
    assert variances.mean() == pytest.approx(1, abs=1e-5)


def test_inverse_takes_forward_back() -> None:
    np.testing.assert_allclose(BASIS.inverse(BASIS.forward(TOKENS)), TOKENS, atol=1e-4)


def test_a_hadamard_matrix_times_the_coordinates_is_the_phi_s_target() -> None:
    target = BASIS.forward(TOKENS) @ hadamard(12).T
    np.testing.assert_allclose(target.var(axis=0), 1, atol=1e-4)
    # A rotation and one scalar: distances keep their ratios.
    np.testing.assert_allclose(
        np.linalg.norm(target, axis=-1) * BASIS.phi, np.linalg.norm(TOKENS - BASIS.mean, axis=-1), rtol=1e-4
    )


def test_cosines_can_be_taken_in_coordinates() -> None:
    lengths = np.linalg.norm(BASIS.forward(TOKENS) + BASIS.rotated_mean, axis=-1) * BASIS.phi
    np.testing.assert_allclose(lengths, np.linalg.norm(TOKENS, axis=-1), rtol=1e-4)


def test_fewer_tokens_than_channels_leave_no_direction_without_a_scale() -> None:
    basis = KltBasis.fit(Moments.of(TOKENS[:5]))
    assert (basis.eigenvalues > 0).all()
    np.testing.assert_allclose(basis.inverse(basis.forward(TOKENS)), TOKENS, atol=1e-3)


def test_nothing_to_calibrate_on_is_an_error() -> None:
    with pytest.raises(CodecError, match="too few"):
        KltBasis.fit(Moments.of(TOKENS[:1]))
    with pytest.raises(CodecError, match="all equal"):
        KltBasis.fit(Moments.of(np.ones((10, 3), np.float32)))
