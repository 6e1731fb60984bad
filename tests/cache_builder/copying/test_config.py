"""Which images a copy takes, and what is refused before anything is read."""

from typing import Any

import pytest

from cache_builder.copying import CopyConfig
from radio_cache.errors import ConfigError

KEYS = [f"{name}/{number}.jpg" for name in ("ant", "bee", "cow") for number in range(40)]


def rows(**options: Any) -> list[int]:
    return CopyConfig(source="a.zarr", target="b.zarr", **options).rows(KEYS).tolist()


def test_without_a_choice_all_rows_are_taken_and_a_limit_takes_the_first() -> None:
    assert rows() == list(range(120))
    assert rows(limit=7) == list(range(7))


def test_a_fraction_is_a_sample_from_everywhere_in_the_order_of_the_rows() -> None:
    found = rows(fraction=0.25)
    assert len(found) == 30
    assert found == sorted(found)
    assert [sum(row // 40 == label for row in found) > 4 for label in range(3)] == [True] * 3
    assert found == rows(fraction=0.25)
    assert found != rows(fraction=0.25, seed=1)


def test_smaller_fractions_are_parts_of_larger_ones() -> None:
    assert set(rows(fraction=0.1)) < set(rows(fraction=0.3)) < set(rows(fraction=1.0))


def test_filters_come_before_fraction_and_limit() -> None:
    assert rows(filters=("bee/*",), limit=3) == [40, 41, 42]
    assert {row // 40 for row in rows(filters=("!bee/*",), fraction=0.5)} == {0, 2}
    assert len(rows(filters=("!bee/*",), fraction=0.5)) == 40


def test_at_least_one_image_is_taken() -> None:
    assert len(rows(fraction=1e-6)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "--fraction 0: a fraction of the images is above 0 and at most 1"),
        ({"fraction": 10}, "--fraction 10: a fraction"),
        ({"fraction": 0.5, "limit": 3}, "--fraction and --limit both set the number of images"),
        ({"limit": 0}, "limit must be at least 1, not 0"),
        ({"filters": ("owl/*",)}, r"--filter owl/\*: none of 120 images matches, such as ant/0\.jpg"),
        ({"fidelity": 0.99}, "--fidelity applies only to transcoding: add --packing"),
        ({"packing": "zstd", "fidelity": 1.5}, "fidelity 1.5 is a mean cosine"),
        ({"teachers": ("clip", "sam", "clip")}, "--teacher clip is given twice"),
        ({"threads": 0}, "threads must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rows(**options)
