"""A cache is known by its images: it is told where they were moved to, and believes it after it has compared them."""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cache_builder.build import BuildReport
from cache_builder.cli import main
from cache_builder.relocate import relocate
from radio_cache import Cache
from radio_cache.errors import ConfigError, StaleCacheError
from radio_cache.testing import write_images

Build = Callable[..., BuildReport]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_images(tmp_path / "photos", per_class=4)
    return tmp_path / "photos"


def relocated(cache: Path, *places: Path) -> Any:
    return CliRunner().invoke(main, ["relocate", str(cache), *(word for one in places for word in ("--images", str(one)))])


def test_a_moved_folder_is_noted_and_a_build_goes_on_from_there(build: Build, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    build(images=(str(photos),), limit=None)
    moved = photos.rename(tmp_path / "elsewhere")
    result = relocated(out, moved)
    assert result.exit_code == 0, result.output
    assert f"its images are in {moved} now" in " ".join(result.output.split())
    assert Cache(out).read_file(3) == (moved / "blue/3.png").read_bytes()
    assert build(images=(str(moved),)).results[0].images == 0


def test_moved_tars_keep_their_order(build: Build, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    for name in ("blue", "red"):
        with tarfile.open(tmp_path / f"tars/{name}.tar", "w") as tar:
            for path in sorted((photos / name).iterdir()):
                tar.add(path, path.name)
    out = build(images=(str(tmp_path / "tars"),)).cache.path
    moved = (tmp_path / "tars").rename(tmp_path / "moved")
    with pytest.raises(StaleCacheError, match=r"image \S+ is not the same in .*red\.tar \(before in .*blue\.tar\)"):
        relocate(Cache(out), [str(moved / "red.tar"), str(moved / "blue.tar")])
    assert [Path(one.path).parent.name for one in relocate(Cache(out), [str(moved)]).meta.containers] == ["moved"] * 2


def test_another_number_or_kind_of_places_and_other_images_are_refused(build: Build, photos: Path, tmp_path: Path) -> None:
    cache = build(images=(str(photos),)).cache
    with pytest.raises(ConfigError, match=r"has its images in 1 folder .*names 2 folders: name as many of the same kind"):
        relocate(cache, [str(photos / "blue"), str(photos / "red")])
    write_images(tmp_path / "other", per_class=4, seed=1)
    with pytest.raises(StaleCacheError, match="Nothing was changed"):
        relocate(cache, [str(tmp_path / "other")])
    (tmp_path / "empty").mkdir()
    result = relocated(cache.path, tmp_path / "empty")
    assert result.exit_code == 1
    assert "No such file" in result.output
    assert Cache(cache.path).meta == cache.meta
