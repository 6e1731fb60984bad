import numpy as np
import pytest

from radio_cache.statistics.fidelity import chain_fidelity, combine_fidelity, measure_fidelity

FEATURES = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32) + 1


def test_the_same_features_are_perfect() -> None:
    fidelity = measure_fidelity(FEATURES, FEATURES)
    assert (fidelity.num_tokens, fidelity.relative_mse) == (200, 0)
    assert fidelity.cosine == pytest.approx(1)


def test_scaling_changes_no_cosine_but_the_squared_error() -> None:
    fidelity = measure_fidelity(FEATURES, 2 * FEATURES)
    assert fidelity.cosine == pytest.approx(1)
    assert fidelity.relative_mse == pytest.approx(
        np.square(FEATURES).sum() / (FEATURES.var(axis=0).sum() * 200), rel=1e-5
    )


def test_the_mean_token_has_a_relative_error_of_one() -> None:
    assert measure_fidelity(
        FEATURES, np.broadcast_to(FEATURES.mean(axis=0), FEATURES.shape)
    ).relative_mse == pytest.approx(1)


def test_a_few_bad_tokens_show_in_the_worst_percentile() -> None:
    broken = FEATURES.copy()
    broken[:5] *= -1
    fidelity = measure_fidelity(FEATURES, broken)
    assert fidelity.cosine == pytest.approx(0.95)
    assert fidelity.cosine_worst == pytest.approx(-1)


def test_zero_tokens_agree_with_each_other_only() -> None:
    zeros = np.zeros((1, 3), np.float32)
    assert measure_fidelity(zeros, zeros).cosine == 1
    assert measure_fidelity(zeros, zeros + 1).cosine == 0


def test_parts_combine_by_tokens_and_nothing_combines_to_nothing() -> None:
    parts = [
        measure_fidelity(FEATURES[:50], FEATURES[:50] + 0.1),
        measure_fidelity(FEATURES[50:], FEATURES[50:]),
        measure_fidelity(FEATURES[:0], FEATURES[:0]),
    ]
    whole = combine_fidelity(parts)
    assert whole is not None
    assert whole.num_tokens == 200
    assert whole.cosine == pytest.approx(
        measure_fidelity(FEATURES, np.concatenate([FEATURES[:50] + 0.1, FEATURES[50:]])).cosine
    )
    assert whole.cosine_worst == parts[0].cosine_worst
    assert combine_fidelity([]) is None


def test_two_independent_errors_multiply_in_cosine_and_add_in_squares() -> None:
    rng = np.random.default_rng(3)
    true = rng.normal(size=(4000, 64)).astype(np.float32)
    once = true + 0.1 * rng.normal(size=true.shape).astype(np.float32)
    twice = once + 0.2 * rng.normal(size=true.shape).astype(np.float32)
    estimate, measured = (
        chain_fidelity(measure_fidelity(true, once), measure_fidelity(once, twice)),
        measure_fidelity(true, twice),
    )
    assert estimate.cosine == pytest.approx(measured.cosine, abs=5e-4)
    assert estimate.squared_error == pytest.approx(measured.squared_error, rel=0.02)
    assert estimate.cosine_worst == pytest.approx(measured.cosine_worst, abs=5e-3)
