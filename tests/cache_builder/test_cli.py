"""`radio-cache`: what a user types, and what a user sees."""

import io
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from cache_builder.cli import main
from cache_builder.teachers import ALIASES
from radio_cache import Cache, __version__
from radio_cache.codecs import klt_zstd
from radio_cache.terminal.output import human_bytes
from radio_cache.testing import write_images

Run = Callable[..., Result]


@pytest.fixture
def run(fake_teachers: tuple[str, ...], tmp_path: Path, ten_images: Path) -> Run:
    """run("--size", "40") -> result of `radio-cache build` of ten images by both fake teachers into out.zarr."""

    def build(*options: str, images: Path = ten_images, teachers: tuple[str, ...] = fake_teachers) -> Result:
        chosen = [word for name in teachers for word in ("--teacher", name)]
        out = () if "--out" in options else ("--out", str(tmp_path / "out.zarr"))
        return command("build", "--images", str(images), *out, *chosen, *options)

    return build


def command(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["--", *arguments] if not arguments else list(arguments))


def assert_one_error(result: Result, message: str) -> None:
    """Exit code 1 and one message on standard error; no traceback, nothing on standard output."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]
    assert "Traceback" not in result.stderr


# ---------------------------------------------------------------- building


def test_a_build_ends_with_a_table_and_the_next_command(run: Run, tmp_path: Path) -> None:
    result = run()
    assert result.exit_code == 0, result.output
    title, first, second, *_ = result.stdout.splitlines()
    columns = "teacher images made now images/s time codec cosine bytes/image stored"
    assert title.split() == columns.split()
    assert first.split()[:3] == ["fake-a", "10", "10"]
    assert second.split()[:3] == ["fake-maps", "10", "10"]
    assert f"{tmp_path}/out.zarr is complete. Next: radio-train --cache {tmp_path}/out.zarr" in result.stdout
    assert "files of 3 shards are there, in the sizes recorded" in result.stdout
    assert "building" in result.stderr
    assert "fake-a: fake-a is made up" in result.stderr


def test_the_last_line_of_a_teacher_counts_the_bytes_of_its_last_shard(run: Run, tmp_path: Path) -> None:
    lines = run("--shard-images", "16").stderr.splitlines()
    (progress,) = (line for line in lines if line.startswith("fake-a: 10/10 images"))
    stored = Cache(tmp_path / "out.zarr").teachers["fake-a"].stored_bytes()
    assert progress.endswith(f", {human_bytes(stored)} written")


def test_the_same_command_again_computes_nothing(run: Run) -> None:
    run()
    _, first, second, *_ = run().stdout.splitlines()
    assert first.split()[:4] == ["fake-a", "10", "0", "-"]
    assert second.split()[:4] == ["fake-maps", "10", "0", "-"]


def test_size_and_fit_reach_the_teachers_they_name(run: Run, tmp_path: Path) -> None:
    assert run("--size", "40", "--size", "fake-maps=48", "--fit", "fake-a=pad").exit_code == 0
    teachers = Cache(tmp_path / "out.zarr").teachers
    assert teachers["fake-a"].spec.geometry.input_hw == (40, 40)
    assert teachers["fake-maps"].spec.geometry.input_hw == (48, 48)
    assert [teachers[name].spec.geometry.fit for name in teachers] == ["pad", "squash"]


def test_weights_reach_the_teacher_they_name(run: Run, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"weights")
    assert run("--weights", f"fake-maps={tmp_path}/w.pth").exit_code == 0
    teachers = Cache(tmp_path / "out.zarr").teachers
    assert teachers["fake-maps"].spec.weights == f"{tmp_path}/w.pth"
    assert teachers["fake-a"].spec.weights == "Python package radio-cache"


def test_on_the_cpu_the_forward_pass_is_float32_unless_asked_otherwise(run: Run, tmp_path: Path) -> None:
    assert run("--device", "cpu").exit_code == 0
    assert Cache(tmp_path / "out.zarr").teachers["fake-a"].spec.compute_dtype == "float32"
    assert_one_error(
        run("--device", "cpu", "--dtype", "bfloat16"), "compute_dtype is float32, this run asks for bfloat16"
    )


def test_an_alias_names_the_group_in_the_cache(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALIASES, "short", "fake-a")
    assert run(teachers=("short",)).exit_code == 0
    assert list(Cache(tmp_path / "out.zarr").teachers) == ["short"]


# ---------------------------------------------------------------- mistakes on the command line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--teacher", "fake-b"], r"no teacher is called 'fake-b'\. Did you mean 'fake-a' or 'fake-maps'\? "),
        (["--teacher", "fake-a"], "--teacher fake-a is given twice"),
        (["--weights", "w.pth"], r"--weights w\.pth: with several teachers, name one"),
        (["--weights", "clip=w.pth"], "'clip' is not among the teachers of this build"),
        (["--weights", "fake-a=nowhere.pth"], r"teacher 'fake-a': --weights nowhere\.pth does not exist"),
        (["--size", "big"], "--size big: a size is a whole number of pixels"),
        (["--size", "fake-a=33"], "input size 33 px is not a multiple of the patch, 8 px; nearest: 32"),
        (["--fit", "stretch"], "--fit stretch: one of squash, crop, pad"),
        (["--device", "tpu"], "--device tpu cannot be used here: "),
        (["--limit", "0"], "limit must be at least 1, not 0"),
        (["--threads", "0"], "threads must be at least 1, not 0"),
        (["--shard-images", "0"], "shard images must be at least 1, not 0"),
        (["--images", "nowhere"], "nowhere does not exist: --images takes a folder of images, WebDataset tars"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence_and_nothing_is_made(
    run: Run, tmp_path: Path, options: list[str], message: str
) -> None:
    assert_one_error(run(*options), message)
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_named(run: Run) -> None:
    assert_one_error(run("--device", "cuda"), "--device cuda cannot be used here: ")


def test_an_occupied_output_is_one_sentence(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out.zarr").write_text("mine")
    assert_one_error(run(), r"out\.zarr exists and is not empty: choose another place, or remove it")


def test_an_output_below_a_file_is_one_sentence(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out.zarr").write_text("mine")
    result = run("--out", str(tmp_path / "out.zarr/inner.zarr"))
    assert_one_error(result, r"out\.zarr.* Nothing is lost: the same command continues")


# ---------------------------------------------------------------- bad images


def file_bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of a few dozen bytes that claims 50000 x 50000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


NOISE = Image.effect_noise((60, 40), 90)
BAD = {
    "bomb.png": (bomb(), "decompression bomb"),
    "cut.jpg": (file_bytes(NOISE, "JPEG")[:900], "cannot be decoded"),
    "empty.png": (b"", "the file is empty (0 bytes)"),
    "float.tiff": (file_bytes(NOISE.convert("F"), "TIFF"), "32-bit float pixels"),
    "page.jpg": (b"<html>404</html>", "not an image in a format PIL knows"),
    "strip.png": (file_bytes(Image.new("L", (900, 2)), "PNG"), "too long and thin"),
}
GOOD = {
    "animated.gif": file_bytes(NOISE, "GIF", save_all=True, append_images=[NOISE]),
    "cmyk.jpg": file_bytes(NOISE.convert("CMYK"), "JPEG"),
    "deep.png": file_bytes(Image.new("I;16", (30, 20), 30_000), "PNG"),
    "one.png": file_bytes(Image.new("1", (1, 1)), "PNG"),
    "palette.png": file_bytes(NOISE.convert("P"), "PNG", transparency=0),
}


@pytest.fixture
def mixed_images(tmp_path: Path) -> Path:
    """One of every bad image, and the odd but good ones."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, data in {name: data for name, (data, _) in BAD.items()}.items():
        (folder / name).write_bytes(data)
    for name, data in GOOD.items():
        (folder / name).write_bytes(data)
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    return folder


def test_a_teacher_added_later_takes_the_shards_that_the_cache_has(
    run: Run, fake_teachers: tuple[str, ...], tmp_path: Path
) -> None:
    first, second = fake_teachers
    assert run("--shard-images", "4", "--max-pixels", "1000000", teachers=(first,)).exit_code == 0
    result = run(teachers=(second,))
    assert result.exit_code == 0, result.output
    cache = Cache(tmp_path / "out.zarr")
    assert (cache.meta.shard_images, cache.meta.max_pixels) == (4, 1_000_000)
    assert set(cache.teachers) == set(fake_teachers)
    assert_one_error(
        run("--shard-images", "5", teachers=(second,)), "was built with --shard-images 4, this run asks for 5"
    )


def test_bad_images_never_stop_a_build_and_are_counted_and_listed(run: Run, tmp_path: Path, mixed_images: Path) -> None:
    result = run("--shard-images", "4", images=mixed_images)
    assert result.exit_code == 0, result.output
    bad, total = len(BAD) + 1, len(BAD) + 1 + len(GOOD)
    assert f"{bad} of {total} images cannot be used and are left out:" in result.stderr
    assert f"... and {bad - 5} more: radio-cache info {tmp_path}/out.zarr --failures" in result.stderr
    assert (
        f"{bad} of {total} images could not be used: radio-cache info {tmp_path}/out.zarr --failures" in result.stdout
    )
    cache = Cache(tmp_path / "out.zarr")
    assert [cache.index.keys[row] for row in cache.usable_rows(cache.teachers)] == sorted(GOOD)

    listed = command("info", str(tmp_path / "out.zarr"), "--failures")
    assert listed.exit_code == 0
    text = " ".join(listed.stdout.split())
    for name, (_, reason) in BAD.items():
        assert re.search(rf"{re.escape(name)} [^|]*{re.escape(reason)}", text), text
    assert "gone.jpg cannot be read: No such file or directory" in text


def test_bad_images_alone_are_one_error(run: Run, mixed_images: Path) -> None:
    for name in GOOD:
        (mixed_images / name).unlink()
    assert_one_error(
        run(images=mixed_images), rf"none of the {len(BAD) + 1} images can be used: radio-cache info .*--failures"
    )


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_an_image_without_permission_is_a_bad_image(run: Run, tmp_path: Path) -> None:
    write_images(tmp_path / "photos", per_class=1)
    (tmp_path / "photos/blue/0.png").chmod(0)
    assert "blue/0.png: cannot be read: Permission denied" in run(images=tmp_path / "photos").stderr


# ---------------------------------------------------------------- the other commands


def test_info_describes_a_cache(run: Run, tmp_path: Path) -> None:
    run()
    result = command("info", str(tmp_path / "out.zarr"))
    assert result.exit_code == 0
    assert "10 images in 1 shard of 128, 2 classes, 0 unusable" in result.stdout
    assert "fake-maps" in result.stdout


def test_info_of_something_else_is_one_sentence(tmp_path: Path) -> None:
    assert_one_error(command("info", str(tmp_path)), r"is a folder, but not a radio-cache store: it has no zarr\.json")
    assert_one_error(command("info", str(tmp_path / "nowhere")), "nowhere does not exist")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["build", "--help"], ["info", "-h"], ["teachers", "-h"]])
def test_help_fits_a_terminal(arguments: list[str]) -> None:
    result = command(*arguments)
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 110


def test_version() -> None:
    assert command("--version").stdout == f"radio-cache, version {__version__}\n"


def test_a_real_teacher_builds_a_cache_of_ten_images(tmp_path: Path, ten_images: Path) -> None:
    result = command(
        "build",
        "--images",
        str(ten_images),
        "--teacher",
        "efficientnet-lite0",
        "--size",
        "96",
        "--fit",
        "squash",
        "--shard-images",
        "4",
        "--out",
        str(tmp_path / "out.zarr"),
    )
    assert result.exit_code == 0, result.output
    cache = Cache(tmp_path / "out.zarr")
    teacher = cache.teachers["efficientnet-lite0"]
    assert teacher.maps(range(10)).shape == (10, 3, 3, 320)
    assert teacher.summaries(range(10)).shape == (10, 1280)
    assert cache.usable_rows(["efficientnet-lite0"]).tolist() == list(range(10))


@pytest.mark.parametrize("shard_images", ["16", "79"], ids=["whole shards", "a last shard of one image"])
def test_a_zstd_build_in_nibbles_ends_well_and_everything_reads_it(
    run: Run, tmp_path: Path, shard_images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(klt_zstd, "_compressed_bytes", lambda codec, _: int(codec.layout != "nibbles"))
    write_images(tmp_path / "many", classes=("ant", "bee"), per_class=40, size=24)
    result = run("--packing", "zstd", "--shard-images", shard_images, images=tmp_path / "many")
    assert result.exit_code == 0, result.output
    out, copies = tmp_path / "out.zarr", tmp_path / "copies.zarr"
    cache = Cache(out)
    assert {getattr(teacher.codec, "layout", None) for teacher in cache.teachers.values()} == {"nibbles"}
    for teacher in cache.teachers.values():
        assert teacher.maps([]).shape == (0, 4, 4, 5)
        assert teacher.maps([79]).shape == (1, 4, 4, 5)
    again = run("--packing", "zstd", "--shard-images", shard_images, images=tmp_path / "many")
    assert again.exit_code == 0, again.output
    for arguments in (
        ("info", str(out)),
        ("verify", str(out)),
        ("verify", str(out), "--recompute", "3"),
        ("view", str(out), "--out", str(tmp_path / "view.png")),
        ("copy", str(out), str(copies), "--fraction", "0.4"),
        ("verify", str(copies)),
    ):
        result = command(*arguments)
        assert result.exit_code == 0, (arguments, result.output)


@pytest.mark.slow
def test_the_installed_command_finishes_a_zstd_build_of_a_real_teacher(tmp_path: Path) -> None:
    write_images(tmp_path / "many", classes=("ant", "bee"), per_class=33, size=64)
    build = (
        "build",
        "--images",
        str(tmp_path / "many"),
        "--teacher",
        "efficientnet-lite0",
        "--out",
        str(tmp_path / "c.zarr"),
        "--packing",
        "zstd",
        "--fidelity",
        "0.9",
    )
    for _ in range(2):
        result = installed(*build)
        assert result.returncode == 0, result.stderr
    assert '"layout": "nibbles"' in (tmp_path / "c.zarr/teachers/efficientnet-lite0/zarr.json").read_text()


def installed(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The program as pip installed it, in its own process."""
    program = shutil.which("radio-cache", path=Path(sys.executable).parent)
    assert program is not None
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_the_installed_command_answers_and_fails_without_a_traceback(tmp_path: Path) -> None:
    assert installed("--version").stdout == f"radio-cache, version {__version__}\n"
    failed = installed("info", str(tmp_path))
    assert failed.returncode == 1
    assert failed.stderr == f"error: {tmp_path} is a folder, but not a radio-cache store: it has no zarr.json\n"


@pytest.mark.slow
def test_the_installed_command_builds_with_a_real_teacher(tmp_path: Path, ten_images: Path) -> None:
    done = installed(
        "build",
        "--images",
        str(ten_images),
        "--teacher",
        "efficientnet-lite0",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out.zarr"),
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"efficientnet-lite0 +10 +10 ", done.stdout)
    assert "Warning" not in done.stderr
    assert Cache(tmp_path / "out.zarr").teachers["efficientnet-lite0"].maps(range(10)).shape == (10, 7, 7, 320)


# ---------------------------------------------------------------- verify, repair, drop


def test_verify_repair_and_build_bring_a_damaged_cache_back(run: Run, tmp_path: Path) -> None:
    run()
    out = tmp_path / "out.zarr"
    shard = out / "teachers/fake-a/spatial/c/0/0/0/0/0"
    good = shard.read_bytes()
    runner = CliRunner()
    assert "all that is there is right" in runner.invoke(main, ["verify", str(out), "--deep"]).output
    shard.write_bytes(good[:5] + bytes([good[5] ^ 1]) + good[6:])
    found = runner.invoke(main, ["verify", str(out)])
    assert found.exit_code == 1
    assert "teachers/fake-a/spatial/c/0/0/0/0/0: does not match its checksum" in found.output
    assert f"radio-cache repair {out}" in found.output
    assert "fake-a, shard 0: dropped" in runner.invoke(main, ["repair", str(out)]).output
    run()
    assert shard.read_bytes() == good
    assert runner.invoke(main, ["verify", str(out), "--deep"]).exit_code == 0
    assert "nothing to repair" in runner.invoke(main, ["repair", str(out)]).output


def test_what_no_build_can_make_again_is_not_said_to_be_mended_by_repair(run: Run, tmp_path: Path) -> None:
    run()
    out = tmp_path / "out.zarr"
    (out / "teachers/fake-a/zarr.json").write_bytes(b"{}")
    found = command("verify", str(out))
    assert found.exit_code == 1
    assert found.stdout.splitlines()[-1] == "1 damaged. No build can make that again: the lines above name the cure"
    (out / "teachers/fake-maps/spatial/c/0/0/0/0/0").write_bytes(b"")
    last = command("verify", str(out)).stdout.splitlines()[-1]
    assert last.startswith(f"2 damaged. Mend 1: radio-cache repair {out}, then the build command again, and follow")


def test_a_teacher_is_dropped_after_a_question(run: Run, tmp_path: Path) -> None:
    run()
    out = tmp_path / "out.zarr"
    runner = CliRunner()
    assert runner.invoke(main, ["drop-teacher", str(out), "fake-a"], input="n\n").exit_code != 0
    assert "fake-a" in Cache(out).teachers
    assert "fake-a was removed" in runner.invoke(main, ["drop-teacher", str(out), "fake-a", "--yes"]).output
    assert list(Cache(out).teachers) == ["fake-maps"]
    assert "no cached teacher is called 'fake-a'" in runner.invoke(main, ["drop-teacher", str(out), "fake-a"]).output
