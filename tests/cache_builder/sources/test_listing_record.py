"""When a cache's own list of images may stand for listing the sources again."""

import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cache_builder.sources import Listing, ListingRequest, Selection, list_for, record_listing
from cache_builder.sources.listing_record import LISTING_FILE, is_listed_by_older_version, selection_changes
from radio_cache import Cache, CacheMeta
from radio_cache.testing import write_images
from radio_cache.writer import create_cache

LONG_AGO_S = 3600


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of two, a tar of two, and a list of the first two; all untouched for an hour."""
    root = tmp_path / "sources"
    write_images(root / "photos", per_class=2)
    with tarfile.open(root / "t.tar", "w") as tar:
        for name in ("blue/0.png", "red/1.png"):
            tar.add(root / "photos" / name, arcname=name)
    (root / "list.txt").write_text("photos/blue/0.png\nphotos/red/1.png\n")
    settle(root)
    return root


def settle(root: Path) -> None:
    """Let everything look as if it had been untouched for an hour."""
    before = time.time() - LONG_AGO_S
    for folder, _, files in os.walk(root, topdown=False):
        for name in files:
            os.utime(Path(folder) / name, (before, before))
        os.utime(folder, (before, before))


def cache_of(place: Path, *sources: Path | str, selection: Selection | None = None) -> tuple[Cache, ListingRequest]:
    """A cache of these sources with its listing noted, and what was asked for."""
    request = ListingRequest(sources=tuple(map(str, sources)), selection=selection or Selection())
    listing = list_for(request, None)
    meta = CacheMeta(
        num_images=len(listing.index),
        shard_images=4,
        creator="test",
        containers=listing.containers,
        class_names=listing.class_names,
        max_pixels=10_000,
    )
    create_cache(place, meta, listing.index)
    cache = Cache(place)
    record_listing(cache, request, listing)
    return Cache(place), request


def again(cache: Cache, request: ListingRequest) -> Listing:
    return list_for(request, Cache(cache.path))


@pytest.mark.parametrize("name", ["photos", "t.tar", "list.txt"])
def test_unchanged_sources_are_not_listed_again(
    photos: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, request = cache_of(tmp_path / "c.zarr", photos / name)
    listed = list_for(request, None)
    monkeypatch.setattr("cache_builder.sources.listing.list_images", lambda *_, **__: pytest.fail("listed again"))
    listing = again(cache, request)
    assert listing.from_cache
    assert list(listing.index.keys) == list(listed.index.keys)
    assert listing.index.labels.tolist() == listed.index.labels.tolist()
    assert (listing.containers, listing.class_names) == (listed.containers, listed.class_names)
    assert listing.notes == (
        f"{len(listed.index)} images, as listed when {cache.url} was made: nothing has changed since",
    )


CHANGES: dict[str, Callable[[Path], object]] = {
    "a new image": lambda root: (root / "photos/red/9.png").write_bytes(b"x"),
    "a new image deeper": lambda root: write_images(root / "photos/red/deep", per_class=1),
    "one image less": lambda root: (root / "photos/red/1.png").unlink(),
    "a renamed image": lambda root: (root / "photos/red/1.png").rename(root / "photos/red/7.png"),
    "a folder gone": lambda root: shutil.rmtree(root / "photos/red"),
    "another tar": lambda root: (root / "t.tar").write_bytes((root / "t.tar").read_bytes() + b"\0" * 512),
    "another list": lambda root: (root / "list.txt").write_text("photos/red/1.png\n"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_may_change_the_list_makes_it_be_made_again(photos: Path, tmp_path: Path, change: str) -> None:
    sources = {"another tar": photos / "t.tar", "another list": photos / "list.txt"}
    cache, request = cache_of(tmp_path / "c.zarr", sources.get(change, photos / "photos"))
    assert again(cache, request).from_cache
    CHANGES[change](photos)
    assert not again(cache, request).from_cache


@pytest.mark.parametrize(
    "selection", [Selection(limit=1), Selection(shuffle_seed=0), Selection(filters=("red/*",))], ids=repr
)
def test_another_selection_is_another_list(photos: Path, tmp_path: Path, selection: Selection) -> None:
    cache, request = cache_of(tmp_path / "c.zarr", photos / "photos")
    assert not again(cache, ListingRequest(sources=request.sources, selection=selection)).from_cache


def test_other_sources_a_pattern_that_matches_more_and_a_link_that_leads_elsewhere_are_noticed(
    photos: Path, tmp_path: Path
) -> None:
    cache, request = cache_of(tmp_path / "a.zarr", photos / "*.tar")
    assert again(cache, request).from_cache
    shutil.copy(photos / "t.tar", photos / "u.tar")
    assert not again(cache, request).from_cache
    link = tmp_path / "link"
    link.symlink_to(photos / "photos")
    cache, request = cache_of(tmp_path / "b.zarr", link)
    assert again(cache, request).from_cache
    shutil.copytree(photos / "photos", photos / "others")
    settle(photos)
    link.unlink()
    link.symlink_to(photos / "others")
    assert not again(cache, request).from_cache


def test_rescan_lists_again_whatever_looks_unchanged(photos: Path, tmp_path: Path) -> None:
    cache, request = cache_of(tmp_path / "c.zarr", photos / "photos")
    assert not list_for(request, cache, rescan=True).from_cache


def test_what_changed_a_moment_before_is_not_trusted(photos: Path, tmp_path: Path) -> None:
    """A file that comes within the same tick of the clock would go unnoticed."""
    (photos / "photos/red/late.png").write_bytes(b"x")
    cache, request = cache_of(tmp_path / "c.zarr", photos / "photos")
    assert json.loads((cache.path / LISTING_FILE).read_text())["stamps"] is None
    assert not again(cache, request).from_cache


def test_notes_for_another_list_of_images_are_not_trusted(photos: Path, tmp_path: Path) -> None:
    """As after a copy of some rows, or a kill between growing the cache and taking the note."""
    cache, request = cache_of(tmp_path / "c.zarr", photos / "photos")
    document = json.loads((cache.path / LISTING_FILE).read_text())
    (cache.path / LISTING_FILE).write_text(json.dumps({**document, "index": "images/index-00000000"}))
    assert not again(cache, request).from_cache


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b'{"index": 3', b"\xff"])
def test_damaged_notes_are_ignored(photos: Path, tmp_path: Path, damage: bytes) -> None:
    cache, request = cache_of(tmp_path / "c.zarr", photos / "photos")
    (cache.path / LISTING_FILE).write_bytes(damage)
    assert not again(cache, request).from_cache


def test_what_an_earlier_version_listed_is_listed_again_and_told_where_it_differs(photos: Path, tmp_path: Path) -> None:
    cache, request = cache_of(tmp_path / "c.zarr", photos / "photos")
    assert again(cache, request).from_cache
    assert not is_listed_by_older_version(cache)
    file = tmp_path / "c.zarr" / LISTING_FILE
    document = json.loads(file.read_text())
    del document["request"]["rules"], document["request"]["member"]  # as version 0.1.0 of November 2026 wrote it
    file.write_text(json.dumps(document))
    assert not again(cache, request).from_cache
    assert is_listed_by_older_version(cache)
    assert selection_changes(cache, request) == []


def test_another_member_lists_again_and_is_named(photos: Path, tmp_path: Path) -> None:
    cache, request = cache_of(tmp_path / "c.zarr", photos / "t.tar")
    changed = replace(request, member="png")
    assert not again(cache, changed).from_cache
    assert selection_changes(cache, changed) == ["--member was not given when the cache was made, and is png now"]
