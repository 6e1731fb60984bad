"""Half precision: the bound of its docstring, and a loud end where it would overflow."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from radio_cache.codecs import Half
from radio_cache.errors import CodecError


@settings(max_examples=300, deadline=None)
@given(st.floats(min_value=-65519, max_value=65519, width=32))
@example(65519.0)
@example(2.0**-24)
@example(2.0**-26)
@example(6.1e-5)
def test_round_trip_error_is_at_most_half_a_step(value: float) -> None:
    features = np.array([value], np.float32)
    error = abs(float(Half().decode(Half().encode(features))[0]) - value)
    assert error <= max(abs(value) * 2.0**-11, 2.0**-25)


@pytest.mark.parametrize(("value", "shown"), [(65520.0, "65520"), (-1e6, "1e.06"), (np.inf, "inf"), (np.nan, "nan")])
def test_overflow_and_nan_are_refused_with_the_value_and_the_cure(value: float, shown: str) -> None:
    with pytest.raises(CodecError, match=f"below 65520, and the teacher returned {shown};.*--dtype float32"):
        Half().encode(np.array([0.5, value], np.float32))


def test_a_map_costs_two_bytes_a_value() -> None:
    assert Half().encode(np.zeros((4, 4, 10), np.float32)).nbytes == 2 * 160
