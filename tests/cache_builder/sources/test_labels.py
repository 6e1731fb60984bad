"""The one rule for classes: whole numbers, names, and what counts as none."""

import math

import pytest

from cache_builder.sources.labels import parse_label, parse_labels


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (3, 3), (3.0, 3), ("3", 3), ("3.0", 3), (" 3\n", 3), ("3.", 3), ("3.000e+00", 3), ("007", 7), (0, 0),
        (True, 1), (False, 0),
        (None, None), ("", None), ("  ", None), (math.nan, None), ("nan", None), ("NaN", None), ("null", None), ("<NA>", None),
        (-1, None), (-1.0, None), ("-1", None), ("-1.0", None), (-100, None),
        ("cat", "cat"), ("1.5", "1.5"), ("n01440764", "n01440764"), ("2024-01-05", "2024-01-05"), (2**31 - 1, 2**31 - 1),
    ],
)  # fmt: skip
def test_a_value_is_a_number_a_name_or_no_class(value: object, label: int | str | None) -> None:
    assert parse_label(value) == label
    assert type(parse_label(value)) is type(label)


@pytest.mark.parametrize("value", [0.5, math.inf, 2**31, [3], {"a": 1}])
def test_what_is_neither_a_number_nor_a_name_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"whole number|so high a number|neither a number nor a name"):
        parse_label(value)


@pytest.mark.parametrize("none", [None, "", "nan", "-1", "None", "NA", "n/a", math.nan])
def test_missing_labels_do_not_turn_numbers_into_names(none: object) -> None:
    numbers, names = parse_labels(["3", none, "10"])
    assert (numbers.tolist(), names) == ([3, -1, 10], None)


def test_one_name_makes_all_labels_names_and_none_may_be_one_of_them() -> None:
    numbers, names = parse_labels(["3", "none", "-1", "cat", "1.50"])
    assert names == ("1.50", "3", "cat", "none")
    assert numbers.tolist() == [1, 3, -1, 2, 0]


def test_no_labels_at_all_are_no_classes() -> None:
    numbers, names = parse_labels([None, "", "-1"])
    assert (numbers.tolist(), names) == ([-1, -1, -1], None)
