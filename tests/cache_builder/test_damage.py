"""Damage to a real cache: it is named with its place and the cure, nothing else is lost, and following the cure brings the
cache back to the last bit, without computing more than was damaged."""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from cache_builder.cli import main
from cache_builder.teachers import FAMILIES, TEACHERS
from radio_cache import Cache
from radio_cache.checks.verify import verify_cache
from radio_cache.errors import StoreError
from radio_cache.receipts import compact_receipts
from radio_cache.storage.local import LocalStorage

SHARD = "teachers/fake-a/spatial/c/0/1/0/0/0"
RECEIPT = "receipts/fake-a/000001.json"


def invoke(images: Path, command: str, path: Path, *more: str) -> Result:
    """The real command; "build" is always the same, of ten images in four shards."""
    options = [
        "--images",
        str(images),
        "--teacher",
        "fake-a",
        "--teacher",
        "fake-maps",
        "--shard-images",
        "3",
        "--batch-size",
        "2",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--out",
    ]
    return CliRunner().invoke(main, [command, *(options if command == "build" else []), str(path), *more])


CODECS = ("--codec", "fake-a=int8", "--codec", "fake-maps=half")


@pytest.fixture
def run(fake_teachers: tuple[str, ...], ten_images: Path) -> Callable[..., Result]:
    """run("verify", path), run("build", path)."""
    del fake_teachers  # known in this process from now on

    def command(name: str, path: Path, *more: str) -> Result:
        return invoke(ten_images, name, path, *(CODECS if name == "build" and not more else more))

    return command


@pytest.fixture(scope="module")
def kept(fake_module: Any, ten_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete cache. For reading only."""
    out = tmp_path_factory.mktemp("kept") / "c.zarr"
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(FAMILIES, "fake", fake_module.FakeTeacher)
        for preset in fake_module.PRESETS:
            patched.setitem(TEACHERS, preset.name, preset)
        made = invoke(ten_images, "build", out, *CODECS)
    assert made.exit_code == 0, made.output
    return out


def flip(position: float, bit: int = 0) -> Callable[[Path], None]:
    """Flips a bit so far into the file: a share, or bytes from the end."""

    def change(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[int(position * len(data)) if position > 0 else int(position)] ^= 1 << bit
        file.write_bytes(data)

    return change


def delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def every_second_file(path: Path) -> None:
    for file in sorted(file for file in path.rglob("*") if file.is_file())[::2]:
        file.unlink()


def log_instead(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """To the log that a unit's receipts are put into first. Given one of these."""

    def damage(receipt: Path) -> None:
        compact_receipts(receipt.parents[2], receipt.parent.name, from_files=1)
        change(next(receipt.parent.glob("log-*.jsonl")))

    return damage


def of_the_other_teacher(shard: Path) -> None:
    shutil.copy(str(shard).replace("fake-maps", "fake-a"), shard)


@dataclass(frozen=True)
class Case:
    """place: what is damaged, and named. reading: what reports it first. cure: commands, in order; empty where only a copy
    helps. computed: images of the damaged teacher that the build then computes."""

    name: str
    place: str
    damage: Callable[[Path], None]
    reading: Callable[[Cache], object]
    cure: tuple[str, ...] = ("repair", "build")
    computed: int = 3
    named: str | None = None


def codes(cache: Cache) -> object:
    return cache.teachers["fake-a"].codes(range(10))


CASES = (
    Case("a truncated shard", SHARD, lambda file: os.truncate(file, 200), codes),
    Case("an empty shard", SHARD, lambda file: os.truncate(file, 0), codes),
    Case("a deleted shard", SHARD, delete, codes),
    Case("a flipped bit in the data", SHARD, flip(0.3), codes),
    Case("a flipped bit in the index", SHARD, flip(-20), codes),
    Case("a flipped bit in the index's checksum", SHARD, flip(-1), codes),
    Case(
        "a flipped bit in a summary",
        "teachers/fake-a/summary/c/0/1/0",
        flip(0.5),
        lambda cache: cache.teachers["fake-a"].summaries([4]),
    ),
    Case("a flipped bit in a receipt", RECEIPT, flip(0.5), lambda cache: cache.usable_rows(["fake-a"])),
    Case(
        "a receipt cut short", RECEIPT, lambda file: os.truncate(file, 40), lambda cache: cache.usable_rows(["fake-a"])
    ),
    Case(
        "a flipped bit in a log",
        RECEIPT,
        log_instead(flip(0.3)),
        lambda cache: cache.receipts("fake-a"),
        named="receipts/fake-a/",
    ),
    Case(
        "a flipped bit in the columns of a log",
        RECEIPT,
        log_instead(flip(-250)),
        lambda cache: cache.usable_rows(["fake-a"]),
        named="receipts/fake-a/",
    ),
    Case("a flipped bit in the sizes", "images/size_hw/c/1/0", flip(0.5), lambda cache: cache.sizes_hw, computed=0),
    Case("a flipped bit in an array's metadata", "teachers/fake-a/spatial/zarr.json", flip(0.5, 1), codes, computed=0),
    Case(
        "a flipped bit in the metadata of the sizes",
        "images/size_hw/zarr.json",
        flip(0.5),
        lambda cache: cache.sizes_hw,
        computed=0,
    ),
    Case(
        "a missing statistics array",
        "teachers/fake-a/stats/spatial",
        delete,
        lambda cache: cache.teachers["fake-a"].spatial_mean_std(),
        computed=10,
    ),
    Case(
        "missing statistics of one shard",
        "teachers/fake-a/stats/summary/c/1/0/0",
        delete,
        lambda cache: cache.teachers["fake-a"].summary_mean_std(),
    ),
    Case("half of the maps deleted", "teachers/fake-a/spatial/c", every_second_file, codes, computed=6),
    Case(
        "a flipped bit in a spec",
        "teachers/fake-a/zarr.json",
        flip(0.5),
        lambda cache: cache.teachers["fake-a"],
        cure=("drop-teacher", "build"),
        computed=10,
    ),
    Case(
        "a missing spec",
        "teachers/fake-a/zarr.json",
        delete,
        lambda _: None,
        cure=("drop-teacher", "build"),
        computed=10,
    ),
    Case(
        "a flipped bit in a codec's array",
        "teachers/fake-a/transform/scale/c/0",
        flip(0.5),
        lambda cache: cache.teachers["fake-a"].maps([0]),
        cure=("drop-teacher", "build"),
        computed=10,
        named="teachers/fake-a/transform",
    ),
    Case(
        "a codec's arrays deleted",
        "teachers/fake-a/transform",
        delete,
        lambda cache: cache.teachers["fake-a"].maps([0]),
        cure=("drop-teacher", "build"),
        computed=10,
    ),
    Case(
        "a teacher's folder deleted",
        "teachers/fake-a",
        delete,
        lambda _: None,
        cure=("drop-teacher", "build"),
        computed=10,
    ),
    Case("all receipts of a teacher deleted", "receipts/fake-a", delete, lambda _: None, cure=("build",), computed=10),
    Case("a flipped bit in the root document", "zarr.json", flip(0.5), lambda _: None, cure=()),
    Case(
        "the list of images deleted",
        "images",
        lambda path: delete(next(path.glob("index-*"))),
        lambda cache: cache.index.key(0),
        cure=(),
        named="images/index-",
    ),
    Case(
        "a flipped bit in the list of images",
        "images",
        lambda path: flip(0.3)(next(path.glob("index-*/key_bytes/c/0"))),
        lambda cache: cache.index.key(5),
        cure=(),
        named="images/index-",
    ),
)


def data_files(path: Path) -> dict[str, bytes]:
    """All files but receipts, which may lie in files of their own or in a log, and the note of when the sources changed,
    which is only made where they have been at rest for a while."""
    storage = LocalStorage(path)
    left_out = ("receipts/", "listing.json")
    return {file: storage.read(file) for file, _ in storage.list_files() if not file.startswith(left_out)}


def refusal(work: Callable[[], object]) -> str:
    try:
        work()
    except StoreError as exc:
        return str(exc)
    return ""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damage_is_named_with_its_cure_which_works_and_nothing_else_is_lost(
    case: Case, kept: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    path = Path(shutil.copytree(kept, tmp_path / "c.zarr"))
    case.damage(path / case.place)
    named = str(path / (case.named or case.place))
    whole = Cache(kept)

    told = refusal(lambda: case.reading(Cache(path)))
    verified = run("verify", path)
    if case.cure == ("build",):  # shards that no receipt vouches for are not damaged, they are not there
        assert verified.exit_code == 0
    else:
        assert verified.exit_code == 1
        assert named.removeprefix(f"{path}/") in verified.output
    for text in filter(None, (told, "" if case.cure == ("build",) else verified.output)):
        assert case.place == "zarr.json" or any(word in text for word in case.cure or ("restore",)), text
    if told:
        assert named in told
        assert (case.cure or ("restore it from a copy",))[0].split("-")[0] in told
    if case.place == "zarr.json":
        assert "restore it from a copy" in verified.output
        refused = run("build", path)
        assert refused.exit_code == 1
        assert str(path / "zarr.json") in refused.output
    else:  # nothing else is lost
        other = Cache(path).teachers["fake-maps"]
        np.testing.assert_array_equal(other.codes(range(10)), whole.teachers["fake-maps"].codes(range(10)))

    if not case.cure:
        shutil.rmtree(path)
        shutil.copytree(kept, path)
    for command in case.cure:
        done = run(command, path, *(["fake-a", "--yes"] if command == "drop-teacher" else []))
        assert done.exit_code == 0, done.output
        if command == "build":
            rows = [line.split() for line in done.stdout.splitlines() if re.match(r"fake-\S+ +\d", line)]
            assert {row[0]: int(row[2]) for row in rows} == {"fake-a": case.computed, "fake-maps": 0}, done.output
    assert data_files(path) == data_files(kept)
    assert run("verify", path, "--deep").exit_code == 0
    cache = Cache(path)
    assert cache.usable_rows(cache.teachers).tolist() == list(range(10))


@pytest.mark.parametrize("gone", ["teachers/fake-a/zarr.json", "teachers/fake-a"])
def test_a_build_does_not_mix_remains_of_a_teacher_with_a_new_one(
    kept: Path, tmp_path: Path, run: Callable[..., Result], gone: str
) -> None:
    path = Path(shutil.copytree(kept, tmp_path / "c.zarr"))
    delete(path / gone)
    before = data_files(path)
    refused = run("build", path)
    assert refused.exit_code == 1
    assert f"radio-cache drop-teacher {path} fake-a, and build it again" in refused.output
    assert data_files(path) == before


@pytest.mark.parametrize("gone", ["teachers/fake-a/transform", "teachers/fake-a/spatial/zarr.json"])
def test_a_build_does_not_call_complete_what_cannot_be_decoded(
    kept: Path, tmp_path: Path, run: Callable[..., Result], gone: str
) -> None:
    path = Path(shutil.copytree(kept, tmp_path / "c.zarr"))
    delete(path / gone)
    refused = run("build", path)
    assert refused.exit_code == 1
    assert str(path / gone) in refused.output
    assert "is complete" not in refused.output


def test_a_repair_says_what_no_build_can_make_again(kept: Path, tmp_path: Path, run: Callable[..., Result]) -> None:
    path = Path(shutil.copytree(kept, tmp_path / "c.zarr"))
    delete(path / "teachers/fake-a/transform")
    left = run("repair", path)
    assert left.exit_code == 1
    assert "1 left alone, which no build can make again" in left.output
    assert "Now run the build command" not in left.output
    flip(0.5)(path / "images/size_hw/c/1/0")
    both = run("repair", path)
    assert both.exit_code == 1
    assert "Now run the build command" in both.output
    assert "1 left alone" in both.output


def test_a_damaged_teacher_is_shown_and_asked_for_by_nobody_unnoticed(
    kept: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    path = Path(shutil.copytree(kept, tmp_path / "c.zarr"))
    flip(0.5)(path / "teachers/fake-a/zarr.json")
    told = run("info", path)
    assert told.exit_code == 0
    assert "fake-a cannot be read" in told.output
    assert "fake-maps" in told.output
    cache = Cache(path)
    for ask in (lambda: cache.teachers["fake-a"], lambda: "fake-a" in cache.teachers, cache.teachers.refuse_unreadable):
        with pytest.raises(StoreError, match=r"fake-a/zarr\.json"):
            ask()
    assert "fake-maps" in cache.teachers
    assert "other" not in cache.teachers
    with pytest.raises(KeyError):
        cache.teachers["other"]


def test_a_shard_of_another_teacher_under_this_name_is_told_apart(run: Callable[..., Result], tmp_path: Path) -> None:
    """Both have maps of the same shape and type here."""
    path = tmp_path / "c.zarr"
    assert run("build", path, "--codec", "half").exit_code == 0
    whole = data_files(path)
    of_the_other_teacher(path / SHARD.replace("fake-a", "fake-maps"))
    with pytest.raises(
        StoreError, match=r"fake-maps/spatial/c/0/1/0/0/0 is another shard's file: `radio-cache repair`"
    ):
        Cache(path).teachers["fake-maps"].codes([4])
    assert [damage.shard for damage in verify_cache(Cache(path)).damages] == [1]
    assert run("repair", path).exit_code == 0
    assert run("build", path, "--codec", "half").exit_code == 0
    assert data_files(path) == whole
