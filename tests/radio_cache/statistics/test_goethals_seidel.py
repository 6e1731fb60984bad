import numpy as np
import pytest

from radio_cache.statistics.goethals_seidel import CIRCULANT_QUADRUPLES, goethals_seidel


@pytest.mark.parametrize("length", CIRCULANT_QUADRUPLES)
def test_autocorrelations_sum_to_zero(length: int) -> None:
    total = np.zeros(length, np.int64)
    for row in CIRCULANT_QUADRUPLES[length]:
        assert set(row) == {"+", "-"}
        signs = np.array([1 if sign == "+" else -1 for sign in row])
        total += [int(signs @ np.roll(signs, shift)) for shift in range(length)]
    assert total.tolist() == [4 * length] + [0] * (length - 1)


def test_the_first_entry_is_positive_whatever_the_sequences_begin_with() -> None:
    for sequences in CIRCULANT_QUADRUPLES.values():
        assert goethals_seidel(sequences)[0, 0] == 1


def test_the_smallest_array_is_written_out_here() -> None:
    expected = [[1, 1, 1, 1], [-1, 1, 1, -1], [-1, -1, 1, 1], [-1, 1, -1, 1]]
    assert goethals_seidel(("+", "+", "+", "+")).tolist() == expected
