import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radio_cache.errors import HadamardError, RadioCacheError
from radio_cache.statistics.hadamard import hadamard, has_hadamard

TEACHER_WIDTHS = (
    112,
    192,
    320,
    384,
    512,
    768,
    832,
    1000,
    1024,
    1152,
    1280,
    1408,
    1536,
    1664,
    1792,
    2048,
    2560,
    3072,
    3200,
    4096,
)

DIGESTS = {
    1: "76be8b528d0075f7",
    2: "7d8c5da7fd418379",
    8: "46b23834a3a95da4",
    12: "4992f5aea70a62b4",
    20: "81095282c9cb586d",
    28: "3922f1bda34d8791",
    36: "04d371644e8879e3",
    52: "79c9fb3620f0e0dd",
    92: "846dc2b5bb6e267c",
    100: "fac6dbdf1a8d955f",
    116: "d5d88bdcff065590",
    144: "0e2277c421348f5a",
    156: "b47623410f17dc46",
    172: "c72f632cae3cb868",
    188: "abeee9c9770db9cf",
    236: "0835f0372f3d8402",
    252: "c1bec787624efd08",
    260: "d64a6bb2605a7673",
    320: "190de879bd2278a4",
    384: "393aa421d764a4d2",
    768: "0178607fe092e7db",
    832: "ca7025196ae23ffa",
    1000: "32c463dceabc8ca7",
    1152: "b54858809e15cfcf",
    1280: "7eebc2d95da45879",
    1536: "9b6c12ad3d3a3628",
}
"""Order -> start of the SHA-256 of its packed signs. These never change: targets of trained students depend on them."""


def _assert_orthonormal_and_flat(order: int) -> None:
    matrix = hadamard(order)
    assert matrix.shape == (order, order)
    assert matrix.dtype == np.float64
    assert set(np.unique(np.abs(matrix))) == {1 / np.sqrt(order)}
    assert matrix[0, 0] > 0
    # In float32 products of signs are exact: no rounding can hide a wrong one.
    signs = np.sign(matrix).astype(np.float32)
    np.testing.assert_array_equal(signs @ signs.T, order * np.eye(order, dtype=np.float32))


def test_every_multiple_of_4_up_to_320_has_a_matrix() -> None:
    orders = [order for order in range(321) if has_hadamard(order)]
    assert orders == [1, 2, *range(4, 321, 4)]
    for order in orders:
        _assert_orthonormal_and_flat(order)


@pytest.mark.parametrize("order", [404, 452, 476, 508, 520, 532, 736, 768, 1000, 1152])
def test_larger_orders_are_orthonormal(order: int) -> None:
    _assert_orthonormal_and_flat(order)
    matrix = hadamard(order)
    assert np.abs(matrix @ matrix.T - np.eye(order)).max() < 1e-12


def test_every_teacher_width_has_a_matrix() -> None:
    for width in TEACHER_WIDTHS:
        assert has_hadamard(width), width


@pytest.mark.slow
@pytest.mark.parametrize("order", [n for n in TEACHER_WIDTHS if n > 1152])
def test_the_matrices_of_big_teachers_are_orthonormal(order: int) -> None:
    _assert_orthonormal_and_flat(order)


@pytest.mark.parametrize("order", DIGESTS)
def test_the_matrix_of_an_order_is_a_contract(order: int) -> None:
    packed = np.packbits(hadamard(order) > 0).tobytes()
    assert hashlib.sha256(packed).hexdigest()[:16] == DIGESTS[order]


def test_order_4_is_written_out_here() -> None:
    signs = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    np.testing.assert_array_equal(hadamard(4), signs / 2)


@settings(max_examples=100, deadline=None)
@given(st.integers(-8, 2000))
def test_an_order_is_known_or_refused_with_orders_that_work(order: int) -> None:
    if has_hadamard(order):
        assert order in (1, 2) or order % 4 == 0
        return
    with pytest.raises(HadamardError, match=f"of order {order}") as raised:
        hadamard(order)
    if order > 0:
        words = str(raised.value).split("Nearest orders that work: ")[1].split(";")[0]
        below, above = map(int, words.split(" and "))
        assert below < order < above
        for near in (below, above):
            assert has_hadamard(near)


@pytest.mark.parametrize(
    ("order", "sentence"),
    [
        (0, "at least 1"),
        (-4, "at least 1"),
        (3, "multiples of 4. Nearest orders that work: 2 and 4"),
        (30, "none exists, because orders above 2 must be multiples of 4. Nearest orders that work: 28 and 32"),
        (428, "none of the known constructions gives it. Nearest orders that work: 424 and 432"),
    ],
)
def test_the_refusal_says_why(order: int, sentence: str) -> None:
    assert not has_hadamard(order)
    with pytest.raises(HadamardError, match=sentence) as raised:
        hadamard(order)
    assert isinstance(raised.value, RadioCacheError)


def test_changing_the_matrix_one_got_does_not_change_the_next() -> None:
    hadamard(12)[:] = 0
    assert (hadamard(12) != 0).all()
