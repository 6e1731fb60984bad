import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radio_cache.codecs import KltZstd
from radio_cache.codecs.klt_basis import KltBasis
from radio_cache.errors import CodecError
from radio_cache.moments import Moments

TOKENS = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)
BASIS = KltBasis.fit(Moments.of(TOKENS))


@given(st.floats(0.01, 2), st.floats(0.001, 100), st.integers(0, 1000))
def test_every_coordinate_is_off_by_at_most_half_a_step(step: float, loudness: float, seed: int) -> None:
    codec = KltZstd(BASIS, step)
    features = (np.random.default_rng(seed).standard_t(2, size=(3, 2, 8)) * loudness).astype(np.float32)
    true = BASIS.forward(features)
    if np.abs(true).max() > 32639 * step:
        with pytest.raises(CodecError):
            codec.encode(features)
        return
    found = codec.coordinates(codec.encode(features))
    assert (np.abs(found - true) <= step / 2 + 1e-5 * np.abs(true)).all()


@given(st.lists(st.integers(-32639, 32639), min_size=8, max_size=8))
def test_codes_of_any_size_survive_the_two_planes(numbers: list[int]) -> None:
    integers = np.array(numbers, np.int32).reshape(1, 1, 8)
    planes = KltZstd.planes(integers)
    assert planes.shape == (2, 8, 1, 1)
    assert (planes[1] != -128).all()
    np.testing.assert_array_equal(KltZstd(BASIS, 1.0).coordinates(planes), integers)


def test_small_codes_have_an_empty_high_plane() -> None:
    assert (KltZstd.planes(np.arange(-128, 128, dtype=np.int32).reshape(1, 32, 8))[1] == 0).all()


def test_a_code_that_does_not_fit_is_an_error_not_a_saturated_number() -> None:
    with pytest.raises(CodecError):
        KltZstd(BASIS, 0.001).encode(np.full((1, 1, 8), 1e5, np.float32))
