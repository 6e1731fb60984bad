"""What `radio-cache info` says."""

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from radio_cache import Cache
from radio_cache.checks.fidelity_loss import LowFidelityShards
from radio_cache.format.schema import receipt_path
from radio_cache.testing import make_tiny_cache, write_images
from radio_cache.view.info import describe, describe_failures, teacher_infos


def printed(content: RenderableType) -> str:
    file = io.StringIO()
    Console(file=file, width=140, highlight=False).print(content)
    return file.getvalue()


def test_info_counts_images_shards_classes_and_bytes(cache: Cache) -> None:
    text = printed(describe(cache))
    assert "10 images in 3 shards of 4, 2 classes, 1 unusable" in text
    assert "4x4x8" in text
    a, b = teacher_infos(cache)
    assert (a.name, a.summary_dim, a.shards_done, a.num_shards, a.images_done) == ("fake-a", 6, 3, 3, 9)
    assert (b.name, b.summary_dim) == ("fake-b", None)
    assert a.bytes_per_image == a.stored_bytes / 9
    assert "not complete" not in text


def test_info_says_what_is_not_complete_and_how_to_go_on(cache_path: Path) -> None:
    (cache_path / receipt_path("fake-b", 1)).unlink()
    (cache_path / receipt_path("images", 0)).unlink()
    text = printed(describe(Cache(cache_path)))
    assert "67%" in text
    assert "images checked: 2 of 3 shards" in text
    assert "not complete: run the same `radio-cache build` command again to continue" in text


def test_info_of_a_cache_without_teachers_says_so(cache_path: Path) -> None:
    for name in ("fake-a", "fake-b"):
        shutil.rmtree(cache_path / "teachers" / name)
    assert "no teacher yet" in printed(describe(Cache(cache_path)))


def test_failures_are_listed_with_their_reasons(cache: Cache) -> None:
    lines = printed(describe_failures(cache)).splitlines()
    assert lines[0].strip() == "1 image cannot be used"
    assert lines[2].split(maxsplit=1) == ["red/1.png", "marked unusable"]


@pytest.mark.parametrize("key", ["[red]/0.png", "a[/red].png", "a[1]/0.png"])
def test_brackets_in_file_names_are_not_taken_for_markup(tmp_path: Path, key: str) -> None:
    write_images(tmp_path / "photos", per_class=1)
    (tmp_path / "photos" / key).parent.mkdir()
    (tmp_path / "photos/blue/0.png").rename(tmp_path / "photos" / key)
    cache = make_tiny_cache(tmp_path / "c.zarr", tmp_path / "photos", unusable=[key])
    assert key in printed(describe_failures(cache))


def test_info_warns_of_shards_that_kept_less_than_was_asked_for(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    found = LowFidelityShards("fake-a", 0.99, ((1, 0.97),), 3)
    monkeypatch.setattr("radio_cache.view.info.low_fidelity_shards", lambda cache: [found])
    text = " ".join(printed(describe(cache)).split())
    assert "1 of 3 shards are clearly below the requested mean cosine of 0.9900: shard 1 (0.9700)" in text


def test_a_cache_without_failures_says_so_in_a_sentence(tmp_path: Path, photos: Path) -> None:
    cache = make_tiny_cache(tmp_path / "c.zarr", photos)
    assert printed(describe_failures(cache)).split() == f"every scanned image of {cache.url} can be used".split()
