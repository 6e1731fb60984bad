import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radio_cache.codecs import KltPacked
from radio_cache.codecs.bit_allocation import lloyd
from radio_cache.codecs.klt_basis import KltBasis
from radio_cache.codecs.klt_gains import GAIN_BITS, gain_values
from radio_cache.codecs.klt_packed import LARGEST_RELATIVE, MAX_WIDTH, PackedPlan, level_table
from radio_cache.errors import CodecError, StoreError
from radio_cache.statistics.moments import Moments

RNG = np.random.default_rng(0)
TOKENS = (RNG.standard_t(3, size=(3000, 20)) @ np.diag(np.linspace(0.05, 3, 20))).astype(np.float32)
BASIS = KltBasis.fit(Moments.of(TOKENS))
PLAN = PackedPlan.fit(BASIS, BASIS.forward(TOKENS))
CODEC = PLAN.codec(80)


@given(st.integers(0, 10_000), st.floats(1e-3, 1e3), st.integers(20, 150))
def test_every_coordinate_with_bits_is_within_the_stated_bound(seed: int, loudness: float, bits: int) -> None:
    codec = PLAN.codec(bits)
    true = (np.random.default_rng(seed).standard_t(1.5, size=(4, 20)) * loudness).astype(np.float32)
    true = np.clip(true, -1e4, 1e4)
    gains, numbers = codec.quantise(true)
    decoded = codec.dequantise(gains, numbers)
    bound = gain_values(gains)[:, codec.group_of] * codec.scales * codec.worst_error[codec.widths]
    # A gain of the smallest code serves everything quieter, too: silence is off by one level at most.
    has_bits = np.broadcast_to(codec.widths > 0, true.shape)
    assert (np.abs(decoded - true)[has_bits] <= bound[has_bits] * (1 + 1e-4)).all()
    assert (decoded[~has_bits] == 0).all()


@given(st.integers(0, 10_000))
def test_packing_loses_nothing_that_quantising_kept(seed: int) -> None:
    features = np.random.default_rng(seed).standard_t(3, size=(2, 3, 20)).astype(np.float32) * 2
    gains, numbers = CODEC.quantise(BASIS.forward(features))
    packed = CODEC.encode(features)
    assert packed.shape == (2, 3, CODEC.token_bytes)
    np.testing.assert_array_equal(CODEC.coordinates(packed), CODEC.dequantise(gains, numbers))


def test_fields_lie_where_the_format_says() -> None:
    features = TOKENS[:1]
    gains, numbers = CODEC.quantise(BASIS.forward(features))
    as_number = int.from_bytes(CODEC.encode(features).tobytes(), "little")
    fields = [as_number >> (GAIN_BITS * group) & 127 for group in range(4)]
    assert fields == gains[0].tolist()
    for channel in range(20):
        width = int(CODEC.widths[channel])
        assert as_number >> int(CODEC.bit_starts[channel]) & ((1 << width) - 1) == numbers[0, channel]


def test_more_bits_never_take_a_bit_away_and_whole_bytes_are_used() -> None:
    previous = PLAN.codec(0)
    for bits in range(0, 20 * MAX_WIDTH, 7):
        codec = PLAN.codec(bits)
        assert (codec.widths >= previous.widths).all()
        assert codec.widths.sum() >= bits
        previous = codec


def test_louder_channels_get_more_bits() -> None:
    assert CODEC.widths[:5].mean() > CODEC.widths[-5:].mean()


def test_a_loud_channel_whose_first_bit_saves_nothing_gets_its_bits_all_the_same() -> None:
    # Zero nearly everywhere, far out elsewhere, as in the massive channels of large ViTs: two levels, one on each side of
    # zero, are worse than none, and three or four keep nearly all of it.
    rng = np.random.default_rng(1)
    tokens = rng.standard_normal((4000, 32)).astype(np.float32)
    tokens[:, 0] = 60 * rng.choice([-1, 0, 1], p=[0.04, 0.92, 0.04], size=4000)
    basis = KltBasis.fit(Moments.of(tokens))
    plan = PackedPlan.fit(basis, basis.forward(tokens))
    codec = plan.codec(64)
    assert codec.widths[0] >= 2
    lost = np.square(codec.decode(codec.encode(tokens)) - tokens).sum() / np.square(tokens).sum()
    assert lost < 0.1


def test_one_value_far_out_is_followed_by_its_groups_gain() -> None:
    coordinates = BASIS.forward(TOKENS[:1]).copy()
    coordinates[0, 0] = 5000
    decoded = CODEC.dequantise(*CODEC.quantise(coordinates))
    assert decoded[0, 0] == pytest.approx(5000, rel=0.5)


def test_gains_beyond_their_range_are_an_error() -> None:
    with pytest.raises(CodecError):
        CODEC.encode(np.full((1, 20), 1e20, np.float32))


def test_the_gain_code_that_marks_a_hole_is_never_emitted() -> None:
    loudest = np.full((1, 20), np.nextafter(np.float32(LARGEST_RELATIVE), np.float32(0))) * CODEC.scales
    assert CODEC.quantise(loudest * np.float32(0.999))[0].max() <= 126


def test_tables_are_ascending_and_better_with_every_bit() -> None:
    values = RNG.standard_t(4, size=20_000).astype(np.float32)
    errors = []
    for width in range(1, MAX_WIDTH + 1):
        table = lloyd(values, width)
        assert (np.diff(table) > 0).all()
        errors.append(np.square(values - table[np.searchsorted((table[1:] + table[:-1]) / 2, values)]).mean())
    assert (np.diff(errors) < 0).all()
    assert len(level_table(CODEC.levels, 3)) == 8


def test_arrays_that_do_not_fit_each_other_are_refused() -> None:
    arrays = CODEC.arrays()
    with pytest.raises(StoreError, match="do not fit 20 channels"):
        KltPacked.from_json(CODEC.to_json(), arrays | {"scales": CODEC.scales[:5]})
    with pytest.raises(StoreError, match="200 bits"):
        KltPacked.from_json(CODEC.to_json(), arrays | {"widths": np.full(20, 200, np.uint8)})
