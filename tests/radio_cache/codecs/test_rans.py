"""rANS rows: round trips, the compiled code beside NumPy, and bytes that no encoder wrote."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radio_cache.codecs import rans
from radio_cache.codecs.rans import ESCAPE, SLOTS, SYMBOLS, RansCoder, RansError, frequencies_of

LENGTHS = (7, 0, 100, 33)


def coder(lanes: int = 4) -> RansCoder:
    """Four runs of rising magnitude; the first table has symbol 0 and escapes alone."""
    counts = np.zeros((len(LENGTHS), SYMBOLS))
    counts[0, 0] = 1
    for run, scale in ((1, 1.0), (2, 0.4), (3, 30.0)):
        counts[run] = np.exp(-np.arange(SYMBOLS) / scale)
    order = np.random.default_rng(0).permutation(sum(LENGTHS)).astype(np.int32)
    return RansCoder(np.array(LENGTHS, np.int32), order, frequencies_of(counts), lanes)


def values(seed: int, rows: int = 5) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_cauchy((rows, sum(LENGTHS))) * 3
    return np.clip(np.rint(drawn), -32767, 32767).astype(np.int16)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 4), st.sampled_from([1, 3, 4, 16]))
def test_rows_decode_to_the_values_and_numpy_writes_the_same_bytes(seed: int, rows: int, lanes: int) -> None:
    each = coder(lanes)
    expected = values(seed, rows)
    coded, lengths = each.encode(expected, each.largest_row_bytes)
    assert (lengths > 0).all(), "the largest row holds any values"
    np.testing.assert_array_equal(each.decode(coded), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rans, "native", None)
        again, numpy_lengths = each.encode(expected, each.largest_row_bytes)
        np.testing.assert_array_equal(again, coded)
        np.testing.assert_array_equal(numpy_lengths, lengths)
        np.testing.assert_array_equal(each.decode(coded), expected)


def test_the_worst_values_fit_into_the_largest_row() -> None:
    each = coder()
    expected = np.full((1, sum(LENGTHS)), -32767, np.int16)
    coded, lengths = each.encode(expected, each.largest_row_bytes)
    assert lengths[0] > 0
    np.testing.assert_array_equal(each.decode(coded), expected)


@pytest.mark.parametrize("pure", [False, True])
def test_a_row_that_is_too_short_is_not_written(pure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if pure:
        monkeypatch.setattr(rans, "native", None)
    _, lengths = coder().encode(values(0), 40)
    assert (lengths == 0).all()


@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_other_bytes_are_an_error_or_values(pure: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if pure:
        monkeypatch.setattr(rans, "native", None)
    each, rng = coder(), np.random.default_rng(seed)
    coded, _ = each.encode(values(seed), each.largest_row_bytes)
    noise = rng.integers(0, 256, coded.shape, np.uint8)
    with pytest.raises(RansError, match="row 0 is no code"):
        each.decode(noise)
    flipped = coded.copy()
    flipped[1, rng.integers(8, 60)] ^= 1 << rng.integers(0, 8)
    with pytest.raises(RansError, match="row 1 is no code"):
        each.decode(flipped)


def test_frequencies_fill_the_slots_and_keep_an_escape() -> None:
    counts = np.random.default_rng(0).integers(0, 1000, (20, SYMBOLS)).astype(float)
    counts[3] = 0
    frequencies = frequencies_of(counts)
    assert (frequencies.sum(axis=1) == SLOTS).all()
    assert frequencies[:, ESCAPE].min() >= 1
