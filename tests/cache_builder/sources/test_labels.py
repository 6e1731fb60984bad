"""The one rule for classes: whole numbers, names, and what counts as none."""

import math
from pathlib import Path

import numpy as np
import pytest

from cache_builder.sources import list_images
from cache_builder.sources.columns import FEW_NUMBERS, sparse_numbers_named
from cache_builder.sources.labels import parse_label, parse_labels


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (3, 3),
        (3.0, 3),
        ("3", 3),
        ("3.0", 3),
        (" 3\n", 3),
        ("3.", 3),
        ("3.000e+00", 3),
        ("007", 7),
        (0, 0),
        (True, 1),
        (False, 0),
        (None, None),
        ("", None),
        ("  ", None),
        (math.nan, None),
        ("nan", None),
        ("NaN", None),
        ("null", None),
        ("<NA>", None),
        (-1, None),
        (-1.0, None),
        ("-1", None),
        ("-1.0", None),
        (-100, None),
        ("cat", "cat"),
        ("1.5", "1.5"),
        ("n01440764", "n01440764"),
        ("2024-01-05", "2024-01-05"),
        (2**31 - 1, 2**31 - 1),
    ],
)
def test_a_value_is_a_number_a_name_or_no_class(value: object, label: int | str | None) -> None:
    assert parse_label(value) == label
    assert type(parse_label(value)) is type(label)


@pytest.mark.parametrize("value", [0.5, math.inf, 2**31, [3], {"a": 1}])
def test_what_is_neither_a_number_nor_a_name_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"whole number|highest class number|neither a number nor a name"):
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


def test_identifiers_as_classes_become_names_of_few_numbers(tmp_path: Path) -> None:
    """Whoever counts by class would need memory for every number up to the largest."""
    for name in "abcd":
        (tmp_path / f"{name}.jpg").write_bytes(b"x")
    (tmp_path / "list.tsv").write_text("a.jpg\t1000000007\nb.jpg\t2084071\nc.jpg\t1000000007\nd.jpg\t-1\n")
    listing = list_images([str(tmp_path / "list.tsv")])
    assert listing.index.labels.tolist() == [1, 0, 1, -1]
    assert listing.class_names == ("2084071", "1000000007")
    assert any("class numbers go up to 1000000007, of 2 classes" in note for note in listing.notes)


def test_numbers_of_many_classes_stay_numbers() -> None:
    for labels in ([0, FEW_NUMBERS - 1], [-1, -1], []):
        kept, names = sparse_numbers_named(np.array(labels, np.int32))
        assert (kept.tolist(), names) == (labels, None)
    many = np.arange(FEW_NUMBERS + 5, dtype=np.int32)  # a class for every image
    assert sparse_numbers_named(many)[1] is None
    assert sparse_numbers_named(np.array([FEW_NUMBERS, 3], np.int32))[1] == ("3", str(FEW_NUMBERS))
