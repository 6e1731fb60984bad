import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from radio_cache.codecs import Int8

TOKENS = np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32)
CODEC = Int8.fit(TOKENS)


@given(hnp.arrays(np.float32, (3, 6), elements=st.floats(-(2.0**60), 2.0**60, width=32)))
def test_round_trip_error_is_at_most_half_a_step(features: np.ndarray) -> None:
    decoded = CODEC.decode(CODEC.encode(features))
    loudest = (np.abs(features) / CODEC.scale).max(axis=-1, keepdims=True).astype(np.float64)
    # The step doubles until the loudest value fits into 127 of them.
    growth = np.where(loudest > 127, np.maximum(2 * loudest / 127, 1), 1)
    bound = CODEC.scale * growth / 2
    assert (np.abs(decoded.astype(np.float64) - features) <= bound * (1 + 1e-5)).all()


def test_tokens_of_the_calibration_need_no_exponent() -> None:
    assert (CODEC.encode(TOKENS)[..., -1] == 0).all()


def test_a_token_louder_than_any_seen_widens_instead_of_saturating() -> None:
    loud = 1000 * TOKENS[:1]
    assert CODEC.encode(loud)[0, -1] > 0
    np.testing.assert_allclose(CODEC.decode(CODEC.encode(loud)), loud, atol=float(1000 * CODEC.scale.max()))


def test_a_channel_that_was_silent_in_the_calibration_still_has_a_scale() -> None:
    silent = TOKENS.copy()
    silent[:, 2] = 0
    codec = Int8.fit(silent)
    assert np.isfinite(codec.decode(codec.encode(TOKENS))).all()
