import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radio_cache.codecs import KltZstd
from radio_cache.codecs.klt_basis import KltBasis
from radio_cache.codecs.klt_zstd import LARGEST, Layout, fits_nibbles, join_integers, split_integers
from radio_cache.errors import CodecError, StoreError
from radio_cache.statistics.moments import Moments

TOKENS = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)
BASIS = KltBasis.fit(Moments.of(TOKENS))
LAYOUTS: tuple[Layout, ...] = ("planes", "bytes", "nibbles")
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@every_layout
@given(st.floats(0.01, 2), st.floats(0.001, 100), st.integers(0, 1000))
def test_every_coordinate_is_off_by_at_most_half_a_step(
    layout: Layout, step: float, loudness: float, seed: int
) -> None:
    codec = KltZstd(BASIS, step, layout)
    features = (np.random.default_rng(seed).standard_t(2, size=(3, 2, 8)) * loudness).astype(np.float32)
    true = BASIS.forward(features)
    steps = np.full(true.shape[:-1], step)
    if layout != "planes":
        steps *= 2 ** (np.rint(4 * np.log2(np.sqrt(np.square(true.astype(np.float64)).mean(-1)))) / 4)
    if (np.abs(true) > (LARGEST[layout] + 0.5) * steps[..., None]).any():
        with pytest.raises(CodecError):
            codec.encode(features)
        return
    decoded = codec.coordinates(codec.encode(features))
    assert (np.abs(decoded - true) <= 1.001 * steps[..., None] / 2 + 1e-5 * np.abs(true)).all()


@every_layout
@given(data=st.data(), c=st.integers(1, 3), h=st.integers(1, 5), w=st.integers(1, 3))
def test_codes_of_any_size_survive_the_split(layout: Layout, data: st.DataObject, c: int, h: int, w: int) -> None:
    largest = LARGEST[layout]
    numbers = st.lists(st.integers(-largest, largest), min_size=c * h * w, max_size=c * h * w)
    integers = np.array(data.draw(numbers), np.int32).reshape(1, c, h, w)
    low, high = split_integers(integers, layout)
    assert (high != -128).all()
    np.testing.assert_array_equal(join_integers(low, high, layout), integers)


@every_layout
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3000))
def test_the_grid_follows_from_the_shape_of_a_row(layout: Layout, h: int, w: int, channels: int) -> None:
    basis = KltBasis(np.zeros(channels, np.float32), np.zeros((0, 0), np.float32), np.ones(channels, np.float32))
    codec = KltZstd(basis, 1.0, layout)
    shape = codec.row_shape((h, w), channels)
    if layout == "planes":
        assert shape == (2, channels, h, w)
    else:
        assert (codec.grid_height(shape[0]), shape[1]) == (h, w)


def test_small_codes_have_an_empty_high_part() -> None:
    assert (split_integers(np.arange(-128, 128, dtype=np.int32).reshape(8, 8, 4), "bytes")[1] == 0).all()
    assert (split_integers(np.arange(-8, 8, dtype=np.int32).reshape(2, 2, 4), "nibbles")[1] == 0).all()


@every_layout
def test_a_code_that_does_not_fit_is_an_error_not_a_saturated_number(layout: Layout) -> None:
    with pytest.raises(CodecError):
        KltZstd(BASIS, 1e-5, layout).encode(np.full((1, 1, 8), 1e5, np.float32))


@pytest.mark.parametrize("layout", ["bytes", "nibbles"])
@pytest.mark.parametrize("loudness", [0, 1e-30, 1e-9, 1e9])
def test_tokens_of_any_loudness_are_kept_in_proportion(layout: Layout, loudness: float) -> None:
    codec = KltZstd(KltBasis(np.zeros(8, np.float32), np.eye(8, dtype=np.float32), np.ones(8, np.float32)), 0.1, layout)
    features = (TOKENS[:12].reshape(4, 3, 8) * np.float32(loudness)).astype(np.float32)
    codes = codec.encode(features)
    assert (codes != codec.fill_value).any()
    error = np.abs(codec.decode(codes) - features).max()
    # The quietest gain is 2^-31.75: below it there is nothing but zeros.
    assert error <= max(0.06 * np.abs(features).max(), 0.06 * 2**-31.75)


def test_nibbles_are_refused_where_a_channel_alone_could_overflow_them() -> None:
    """The loudest that a channel can be beside its token: it is all there is."""
    channels, token = 1024, np.zeros((1, 1, 1024), np.float32)
    token[..., 0] = 1
    basis = KltBasis(np.zeros(channels, np.float32), np.eye(channels, dtype=np.float32), np.ones(channels, np.float32))
    steps = np.geomspace(1e-3, 1, 200)
    assert {fits_nibbles(step, channels) for step in steps} == {True, False}
    for step in steps:
        if fits_nibbles(step, channels):
            for loudness in 2.0 ** np.linspace(-1, 1, 9):
                KltZstd(basis, step, "nibbles").encode(token * np.float32(loudness))


def test_an_unknown_layout_is_refused() -> None:
    stored = KltZstd(BASIS, 1.0).to_json() | {"layout": "trits"}
    with pytest.raises(StoreError, match="'trits' is not one of planes, bytes, nibbles"):
        KltZstd.from_json(stored, BASIS.arrays())
