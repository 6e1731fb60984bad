"""Filters, shuffling, limits: which images are used, and in what order."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_builder.sources import Selection, list_images
from radio_cache.errors import ConfigError, SourceError

KEYS = ["ant/1.jpg", "ant/2.png", "bee/1.jpg", "bee/draft-1.jpg", "cow/deep/draft/3.jpg"]


def chosen(**settings: object) -> list[str]:
    rows, _ = Selection(**settings).rows(KEYS)  # type: ignore[arg-type]
    return [KEYS[row] for row in rows]


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ((), [0, 1, 2, 3, 4]),
        (("ant/*",), [0, 1]),
        (("*.jpg",), [0, 2, 3, 4]),
        (("ant/*", "cow/*"), [0, 1, 4]),
        (("!*draft*",), [0, 1, 2]),
        (("*.jpg", "!*/draft*"), [0, 2]),
        (("bee/?.jpg",), [2]),
        (("[ab]*/1.*",), [0, 2]),
        (("ANT/*",), []),
    ],
)
def test_patterns_keep_and_patterns_with_a_mark_leave_out(filters: tuple[str, ...], kept: list[int]) -> None:
    assert chosen(filters=filters) == [KEYS[row] for row in kept]


def test_a_shuffled_order_is_the_seeds_alone() -> None:
    """Written down, because a cache built today must go on tomorrow, with other versions of everything."""
    assert chosen(shuffle_seed=0) == [KEYS[row] for row in SEED_0]
    assert chosen(shuffle_seed=1) == [KEYS[row] for row in SEED_1]


SEED_0, SEED_1 = [0, 2, 1, 4, 3], [0, 2, 3, 4, 1]


@given(st.lists(st.text(min_size=1), unique=True, max_size=40), st.integers(), st.integers(1, 50))
def test_shuffling_loses_nothing_and_does_not_depend_on_how_images_are_found(
    keys: list[str], seed: int, limit: int
) -> None:
    found = list(keys)
    random.Random(1).shuffle(found)
    orders: list[list[str]] = []
    for names in (keys, found):
        rows, passing = Selection(shuffle_seed=seed).rows(names)
        assert sorted(rows.tolist()) == list(range(len(names)))
        assert passing == len(names)
        orders.append([names[row] for row in rows])
    assert orders[0] == orders[1]
    some, passing = Selection(shuffle_seed=seed, limit=limit).rows(keys)
    assert [keys[row] for row in some] == orders[0][:limit]
    assert passing == len(keys)


def test_impossible_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="limit must be at least 1, not 0"):
        Selection(limit=0)
    for pattern in ("", "!"):
        with pytest.raises(ConfigError, match=f"--filter '{pattern}' is empty: pass a pattern such as"):
            Selection(filters=(pattern,))


def folder(root: Path) -> str:
    for key in KEYS:
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(b"")
    return str(root)


def test_a_filtered_listing_has_the_classes_of_what_is_left_and_says_how_much_that_is(tmp_path: Path) -> None:
    listing = list_images([folder(tmp_path)], selection=Selection(filters=("!ant/*",), limit=2))
    assert list(listing.index.keys) == ["bee/1.jpg", "bee/draft-1.jpg"]
    assert (listing.class_names, listing.index.labels.tolist()) == (("bee",), [0, 0])
    assert listing.notes == (
        "3 of 5 images pass the filters (--filter)",
        "the first 2 of 3 images are used (--limit)",
    )


def test_a_shuffled_listing_keeps_every_image_with_its_label(tmp_path: Path) -> None:
    listing = list_images([folder(tmp_path)], selection=Selection(shuffle_seed=1, limit=4))
    assert list(listing.index.keys) == chosen(shuffle_seed=1, limit=4)
    classes = [listing.class_names[label] for label in listing.index.labels]
    assert classes == [key.split("/")[0] for key in listing.index.keys]
    assert listing.notes == ("the first 4 of 5 images, shuffled, are used (--limit)",)


def test_a_filter_that_nothing_passes_shows_what_a_key_looks_like(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no image passes --filter 'dog/\*': .* the whole key, such as 'ant/1\.jpg'"):
        list_images([folder(tmp_path)], selection=Selection(filters=("dog/*",)))
