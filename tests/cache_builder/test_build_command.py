"""The printed command makes the same cache again, whatever options it was built with."""

import shlex
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner

from cache_builder.build_command import build_commands
from cache_builder.cli import main
from radio_cache import Cache


def contents(folder: Path) -> dict[str, bytes]:
    """Chunks and shards of a cache by their paths; its documents hold nothing that decides them beyond what `spec` compares."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("c/**/*") if file.is_file()}


def invoke(words: list[str]) -> None:
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--codec", "int8", "--views", "2", "--flip-views", "--shard-images", "4", "--batch-size", "3"],
        ["--codec", "fake-a=half", "--fit", "fake-a=crop", "--size", "fake-a=48", "--size", "fake-a=64"],
        [
            "--filter",
            "!*3*",
            "--shuffle-seed",
            "5",
            "--limit",
            "6",
            "--store-pixels",
            "24",
            "--pixel-format",
            "webp-lossless",
        ],
        ["--dtype", "bfloat16", "--max-pixels", "5000000"],
    ],
)
def test_the_command_of_a_cache_builds_the_same_bytes(
    fake_teachers: tuple[str, ...], ten_images: Path, tmp_path: Path, options: list[str]
) -> None:
    chosen = [word for name in fake_teachers for word in ("--teacher", name)]
    first, second = tmp_path / "first.zarr", tmp_path / "second.zarr"
    invoke(["build", "--images", str(ten_images), *chosen, *options, "--out", str(first)])
    for command in build_commands(Cache(first), str(second)):
        assert command[:2] == ["radio-cache", "build"]
        invoke(command[1:])
    made, again = contents(first), contents(second)
    assert made.keys() == again.keys()
    assert len(made) > 5
    assert [name for name in made if made[name] != again[name]] == []
    specs = [{name: teacher.spec for name, teacher in Cache(place).teachers.items()} for place in (first, second)]
    assert specs[0] == specs[1]


def test_teachers_of_different_builds_get_a_command_each(
    fake_teachers: tuple[str, ...], ten_images: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.zarr", tmp_path / "second.zarr"
    for name, dtype in zip(fake_teachers, ("float32", "bfloat16"), strict=True):
        invoke(["build", "--images", str(ten_images), "--teacher", name, "--dtype", dtype, "--out", str(first)])
    commands = build_commands(Cache(first), str(second))
    assert len(commands) == 2
    for command in commands:
        invoke(command[1:])
    assert contents(first) == contents(second)


def test_a_cache_that_lost_its_listing_names_its_images(
    fake_teachers: tuple[str, ...], ten_images: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first.zarr"
    invoke(["build", "--images", str(ten_images), "--teacher", fake_teachers[0], "--out", str(first)])
    (first / "listing.json").unlink()
    (command,) = build_commands(Cache(first))
    assert command[2:4] == ["--images", str(ten_images)]
    printed = CliRunner().invoke(main, ["info", str(first), "--commands"]).output
    assert shlex.split(printed) == command


def test_the_fit_of_a_librarys_teacher_is_printed(ten_images: Path, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "w.pth")
    chosen = ["--teacher", "timm:test_vit", "--weights", str(tmp_path / "w.pth"), "--fit", "squash"]
    invoke(["build", "--images", str(ten_images), *chosen, "--out", str(tmp_path / "first.zarr")])
    (command,) = build_commands(Cache(tmp_path / "first.zarr"), str(tmp_path / "second.zarr"))
    assert "timm:test_vit=squash" in command
    invoke(command[1:])
    specs = [Cache(tmp_path / name).teachers["timm-test_vit"].spec for name in ("first.zarr", "second.zarr")]
    assert specs[0] == specs[1]
    assert specs[0].geometry.fit == "squash"


def test_no_commands_are_printed_of_a_teacher_that_cannot_be_read(
    fake_teachers: tuple[str, ...], ten_images: Path, tmp_path: Path
) -> None:
    place, name = tmp_path / "c.zarr", fake_teachers[0]
    invoke(["build", "--images", str(ten_images), "--teacher", name, "--out", str(place)])
    document = place / "teachers" / name / "zarr.json"
    document.write_text(document.read_text().replace(name, "another"))
    result = CliRunner().invoke(main, ["info", str(place), "--commands"])
    assert result.exit_code == 1
    assert "does not match its own checksum" in result.output
