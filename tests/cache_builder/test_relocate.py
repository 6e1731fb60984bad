"""A cache is known by its images: it is told where they were moved to, and believes it after it has compared them."""

import shlex
import shutil
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
    return CliRunner().invoke(
        main, ["relocate", str(cache), *(word for one in places for word in ("--images", str(one)))]
    )


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


def test_another_number_or_kind_of_places_and_other_images_are_refused(
    build: Build, photos: Path, tmp_path: Path
) -> None:
    cache = build(images=(str(photos),)).cache
    with pytest.raises(
        ConfigError, match=r"has its images in 1 folder .*names 2 folders: name as many of the same kind"
    ):
        relocate(cache, [str(photos / "blue"), str(photos / "red")])
    write_images(tmp_path / "other", per_class=4, seed=1)
    with pytest.raises(StaleCacheError, match="Nothing was changed"):
        relocate(cache, [str(tmp_path / "other")])
    (tmp_path / "empty").mkdir()
    result = relocated(cache.path, tmp_path / "empty")
    assert result.exit_code == 1
    assert "No such file" in result.output
    assert Cache(cache.path).meta == cache.meta


def test_the_printed_command_names_the_place_where_the_images_are_now(
    build: Build, photos: Path, tmp_path: Path
) -> None:
    out = build(images=(str(photos),), limit=5, shuffle_seed=3).cache.path
    before = {path: path.read_bytes() for path in out.rglob("c/**/*") if path.is_file()}
    moved = photos.rename(tmp_path / "elsewhere")
    assert relocated(out, moved).exit_code == 0
    printed = CliRunner().invoke(main, ["info", "--commands", str(out)]).output
    assert f"--images {moved} " in printed
    assert str(photos) not in printed
    assert "--limit 5 --shuffle-seed 3" in printed
    words = shlex.split(printed)[1:]
    words[words.index("--out") + 1] = str(out)
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 0, again.output
    assert {path: path.read_bytes() for path in out.rglob("c/**/*") if path.is_file()} == before


def test_images_that_were_moved_and_joined_by_others_are_recognised(build: Build, photos: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "more", classes=("red", "white"), per_class=3, seed=5)
    build(images=(str(photos),))
    moved = photos.rename(tmp_path / "elsewhere")
    lines: list[str] = []
    grown = build(images=(str(moved), str(tmp_path / "more")), on_message=lines.append).cache
    assert any(f"are in {moved} now" in line for line in lines)
    assert any("6 images are added to the 8" in line for line in lines)
    undisturbed = build(images=(str(moved), str(tmp_path / "more")), out=tmp_path / "undisturbed.zarr").cache
    assert len(grown.usable_rows(grown.teachers)) == 14
    assert (grown.digests[:] == undisturbed.digests[:]).all()
    for name in grown.teachers:
        for row in range(14):
            assert (grown.teachers[name].maps([row]) == undisturbed.teachers[name].maps([row])).all()


def test_other_images_at_a_place_that_goes_on_are_refused(build: Build, photos: Path, tmp_path: Path) -> None:
    cache = build(images=(str(photos),)).cache
    write_images(tmp_path / "other", per_class=4, seed=1)
    write_images(tmp_path / "more", per_class=3, seed=5)
    with pytest.raises(StaleCacheError, match="is not the same in"):
        build(images=(str(tmp_path / "other"), str(tmp_path / "more")))
    assert Cache(cache.path).meta == cache.meta


def test_renamed_places_are_recognised_by_a_build_before_and_after_relocate(
    build: Build, photos: Path, tmp_path: Path
) -> None:
    build(images=(str(photos / "blue"), str(photos / "red")))
    before = [*Cache(tmp_path / "out.zarr").index.keys]
    (photos / "blue").rename(tmp_path / "cold")
    (photos / "red").rename(tmp_path / "warm")
    places = (tmp_path / "cold", tmp_path / "warm")
    assert relocated(tmp_path / "out.zarr", *places).exit_code == 0
    report = build(images=tuple(map(str, places)))
    assert [result.images for result in report.results] == [0, 0]
    assert [*report.cache.index.keys] == before
    moved = tuple(str(place.rename(place.with_name(f"{place.name}-again"))) for place in places)
    assert [result.images for result in build(images=moved).results] == [0, 0]
    with pytest.raises(StaleCacheError, match="is not the same in"):
        build(images=moved[::-1])


def test_what_is_missing_may_come_back(build: Build, photos: Path, tmp_path: Path) -> None:
    build(images=(str(photos),))
    (photos / "red").rename(tmp_path / "away")
    with pytest.raises(
        StaleCacheError, match=r"4 missing \(such as red/0.png\)\. Mount or put back what is missing, or choose"
    ):
        build(images=(str(photos),))


def test_a_cache_that_knows_no_image_yet_believes_no_place(build: Build, photos: Path, tmp_path: Path) -> None:
    cache = build(images=(str(photos),)).cache
    shutil.rmtree(cache.path / "receipts")
    write_images(tmp_path / "other", per_class=4, seed=1)
    assert not len(Cache(cache.path).usable_rows())
    with pytest.raises(ConfigError, match="knows no image yet"):
        relocate(Cache(cache.path), [str(tmp_path / "other")])
    assert Cache(cache.path).meta == cache.meta
