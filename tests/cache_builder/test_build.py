"""Building a cache: what is in it, what a second run does, and what is refused before any work is done."""

import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

import cache_builder.build
import cache_builder.pipeline.shards
import cache_builder.workers.worker
from cache_builder.build import BuildConfig, BuildReport, build_cache
from cache_builder.pipeline.device import DeviceWork
from cache_builder.sources.listing_record import LISTING_FILE as LISTING
from cache_builder.teachers import FAMILIES, TEACHERS, TeacherOptions, load_teacher
from cache_builder.workers.worker import ShardTask, build_shard
from radio_cache import Cache
from radio_cache.checks.verify import verify_cache
from radio_cache.codecs.calibrate import CodecRequest
from radio_cache.errors import (
    CodecError,
    ConfigError,
    CorruptShardError,
    NotACacheError,
    RadioCacheError,
    SourceError,
    StaleCacheError,
    StoreError,
    TeacherWeightsError,
    UnknownTeacherError,
)
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.schema import receipt_path
from radio_cache.geometry.crops import valid_tokens
from radio_cache.receipts import read_receipt
from radio_cache.statistics.fidelity import measure_fidelity
from radio_cache.storage.local import LocalStorage
from radio_cache.testing import make_tiny_cache, write_images

Build = Callable[..., BuildReport]


@pytest.fixture(scope="session")
def reference(fake_module: Any, ten_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete cache, built once. For reading only."""
    out = tmp_path_factory.mktemp("reference") / "out.zarr"
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(FAMILIES, "fake", fake_module.FakeTeacher)
        for preset in fake_module.PRESETS:
            patched.setitem(TEACHERS, preset.name, preset)
        build_cache(BuildConfig(**fake_module.settings(ten_images, out)))
    return out


@pytest.fixture
def built(reference: Path, tmp_path: Path, fake_teachers: tuple[str, ...]) -> Cache:
    """out.zarr, complete: what `build()` would have made."""
    return Cache(shutil.copytree(reference, tmp_path / "out.zarr"))


def touched(path: Path) -> dict[Path, int]:
    """When each file was written."""
    return {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file() and file.name != LISTING}


def tree(path: Path) -> dict[str, bytes]:
    """Every file below a folder, but for the note of when the sources were changed last, which depends on the clock."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and file.name != LISTING)
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


# ---------------------------------------------------------------- what is in a cache


def test_a_cache_holds_what_the_teacher_says_of_every_image(built: Cache, ten_images: Path, seen_by: Any) -> None:
    cache = built
    assert cache.index.keys == sorted(cache.index.keys)
    assert cache.usable_rows(cache.teachers).tolist() == list(range(10))
    assert cache.meta.class_names == ("ant", "bee")
    for name in ("fake-a", "fake-maps"):
        teacher = load_teacher(name)
        for row, key in enumerate(cache.index.keys):
            out = teacher(seen_by(teacher, Image.open(ten_images / key).convert("RGB")))
            torch.testing.assert_close(
                torch.from_numpy(cache.teachers[name].maps([row])), out.spatial, atol=1e-3, rtol=1e-3
            )
            if out.summary is not None:
                stored = torch.from_numpy(cache.teachers[name].summaries([row]))
                torch.testing.assert_close(stored, out.summary, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_statistics_are_those_of_the_decoded_maps_without_padding(build: Build, fit: Any) -> None:
    cache = build(teachers={"fake-a": TeacherOptions(fit=fit)}).cache
    teacher = cache.teachers["fake-a"]
    sizes = [(int(h), int(w)) for h, w in cache.sizes_hw]
    shown = np.stack([valid_tokens(size, teacher.spec.geometry) for size in sizes])
    assert shown.all() == (fit != "pad")
    tokens = teacher.maps(range(10))[shown].astype(np.float64)
    mean, std = teacher.spatial_mean_std()
    np.testing.assert_allclose(mean, tokens.mean(axis=0), atol=2e-3)
    np.testing.assert_allclose(std, tokens.std(axis=0), atol=2e-3)
    mean, std = teacher.summary_mean_std()
    np.testing.assert_allclose(mean, teacher.summaries(range(10)).mean(axis=0), atol=2e-3)
    np.testing.assert_allclose(std, teacher.summaries(range(10)).std(axis=0), atol=2e-3)


def test_images_in_tars_give_the_same_features_as_in_a_folder(
    build: Build, built: Cache, ten_images: Path, tmp_path: Path
) -> None:
    folder = built
    with tarfile.open(tmp_path / "ten.tar", "w") as tar:
        for number, key in enumerate(folder.index.keys):
            tar.add(ten_images / key, arcname=f"{number:03d}.png")
    tar_cache = build(images=(str(tmp_path / "ten.tar"),), out=tmp_path / "tar.zarr").cache
    np.testing.assert_array_equal(
        tar_cache.teachers["fake-a"].codes(range(10)), folder.teachers["fake-a"].codes(range(10))
    )
    assert tar_cache.read_file(7) == folder.read_file(7)


def test_a_limit_builds_the_first_images_only(build: Build) -> None:
    cache = build(limit=4).cache
    assert cache.num_images == 4
    assert len(cache.teachers["fake-a"].codes(range(4))) == 4


def test_the_notes_of_sources_and_teachers_reach_the_user(build: Build, tmp_path: Path, ten_images: Path) -> None:
    shutil.copytree(ten_images, tmp_path / "photos")
    (tmp_path / "photos/readme.txt").write_text("x")
    said: list[str] = []
    build(images=(str(tmp_path / "photos"),), on_message=said.append)
    assert said == [
        f"{tmp_path}/photos: 1 file skipped (no image by name): 1 .txt, such as readme.txt",
        "fake-a: fake-a is made up",
        "fake-maps: fake-maps is made up",
        "fake-a: 10 images are too few to calibrate the codec klt (it wants 64): keeping float16",
        "fake-maps: 10 images are too few to calibrate the codec klt (it wants 64): keeping float16",
    ]


# ---------------------------------------------------------------- second runs


class CountedCalls:
    """Counts how many images teachers compute."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images = 0
        original = DeviceWork.codes

        def counted(work: DeviceWork, batch: Any) -> Any:
            with lock:
                self.images += len(batch)
            return original(work, batch)

        lock = threading.Lock()
        monkeypatch.setattr(DeviceWork, "codes", counted)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> CountedCalls:
    return CountedCalls(monkeypatch)


def test_a_second_run_computes_nothing_and_changes_nothing(build: Build, computed: CountedCalls) -> None:
    first = build(teachers={"fake-a": TeacherOptions()})
    assert computed.images == 10
    before = touched(first.cache.path)
    second = build(teachers={"fake-a": TeacherOptions()})
    assert computed.images == 10
    assert touched(first.cache.path) == before
    assert [(result.images, result.images_before) for result in first.results] == [(10, 0)]
    assert [(result.images, result.images_before) for result in second.results] == [(0, 10)]


def test_a_build_that_was_overtaken_while_it_listed_goes_on_with_the_others_cache(
    build: Build, computed: CountedCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_for = cache_builder.build.list_for

    def overtaken(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(cache_builder.build, "list_for", list_for)
        build()
        computed.images = 0
        return list_for(*args, **kwargs)

    monkeypatch.setattr(cache_builder.build, "list_for", overtaken)
    report = build()
    assert report.cache.num_images == 10
    assert computed.images == 0


def test_a_teacher_added_later_leaves_the_first_alone(
    build: Build, reference: Path, computed: CountedCalls, tmp_path: Path
) -> None:
    build(teachers={"fake-a": TeacherOptions()})
    before = tree(tmp_path / "out.zarr")
    build(teachers={"fake-maps": TeacherOptions()})
    assert computed.images == 20
    after = tree(tmp_path / "out.zarr")
    assert {name: after[name] for name in before} == before
    assert after == tree(reference)


def test_a_lost_receipt_costs_one_shard(build: Build, built: Cache, reference: Path, computed: CountedCalls) -> None:
    (built.path / receipt_path("fake-a", 1)).unlink()
    build()
    assert computed.images == 3
    assert tree(built.path) == tree(reference)


def test_the_cure_in_the_error_for_a_damaged_shard_works(build: Build, built: Cache, reference: Path) -> None:
    (built.path / "teachers/fake-a/spatial/c/0/2/0/0/0").write_bytes(b"")
    (built.path / receipt_path("fake-a", 2)).unlink()
    build()
    assert tree(built.path) == tree(reference)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("stop_after", [None, 1, 3])
def test_bytes_do_not_depend_on_threads_or_on_what_was_done_before(
    build: Build, reference: Path, tmp_path: Path, threads: int, stop_after: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stop_after is not None:
        original, written = cache_builder.pipeline.shards.write_shard, 0

        def fail_later(*args: Any) -> Any:
            nonlocal written
            written += 1
            if written > stop_after:
                raise OSError(28, "No space left on device")
            return original(*args)

        with monkeypatch.context() as patched:
            patched.setattr(cache_builder.pipeline.shards, "write_shard", fail_later)
            with pytest.raises(OSError, match="No space left"):
                build(threads=threads)
        usable = Cache(tmp_path / "out.zarr").usable_rows(["fake-a"])
        assert usable.tolist() == list(range(min(10, 3 * stop_after)))
    build(threads=threads)
    assert tree(tmp_path / "out.zarr") == tree(reference)


def test_a_unit_of_work_alone_writes_the_same_bytes(
    built: Cache, reference: Path, ten_images: Path, fake_module: Any
) -> None:
    (built.path / receipt_path("fake-a", 3)).unlink()
    config = BuildConfig(**fake_module.settings(ten_images, built.path))
    receipt = build_shard(ShardTask(build="one", config=config, unit="fake-a", shard=3))
    assert (receipt.shard, receipt.first_row, receipt.num_rows, receipt.num_tokens) == (3, 9, 1, 16)
    assert tree(built.path) == tree(reference)


def test_a_failed_shard_is_not_taken_for_done_by_its_receipt_from_before_the_cache_grew(
    built: Cache, ten_images: Path, fake_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_receipt(built.storage, "fake-a", 2)
    assert whole is not None

    def fails(*_: Any, **__: Any) -> Any:
        raise CodecError("what no codec keeps")
        yield

    monkeypatch.setattr(cache_builder.workers.worker, "read_receipt", lambda *_: replace(whole, num_rows=2))
    monkeypatch.setattr(cache_builder.workers.worker, "run_shards", fails)
    config = BuildConfig(**fake_module.settings(ten_images, built.path))
    with pytest.raises(CodecError, match="what no codec keeps"):
        build_shard(ShardTask(build="short", config=config, unit="fake-a", shard=2))


def test_a_worker_lets_go_of_one_teacher_before_it_loads_the_next(
    built: Cache, ten_images: Path, fake_module: Any
) -> None:
    config = BuildConfig(**fake_module.settings(ten_images, built.path))
    for name in ("fake-a", "fake-maps"):
        (built.path / receipt_path(name, 3)).unlink()
    build_shard(ShardTask(build="two", config=config, unit="fake-a", shard=3))
    first = weakref.ref(cache_builder.workers.worker._states[0].teacher)
    build_shard(ShardTask(build="two", config=config, unit="fake-maps", shard=3))
    assert first() is None


def test_leftovers_of_a_build_killed_while_it_made_the_cache_are_removed(build: Build, tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    leftover = tmp_path / f"out.zarr.tmp-{socket.gethostname()}-{ended.pid}-0a1b2c3d"
    (leftover / "images").mkdir(parents=True)
    build()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out.zarr"]


# ---------------------------------------------------------------- unusable images


def test_images_that_cannot_be_used_are_holes_everywhere(build: Build, tmp_path: Path, ten_images: Path) -> None:
    shutil.copytree(ten_images, tmp_path / "photos")
    (tmp_path / "photos/ant/1.png").write_bytes(b"")
    (tmp_path / "photos/bee/0.png").write_bytes(b"hello")
    Image.new("RGB", (600, 3)).save(tmp_path / "photos/bee/strip.png")
    said: list[str] = []
    report = build(images=(str(tmp_path / "photos"),), on_message=said.append)
    cache = report.cache
    assert report.unusable == 3
    assert said[2:6] == [
        "3 of 11 images cannot be used and are left out:",
        "  ant/1.png: the file is empty (0 bytes)",
        "  bee/0.png: not an image in a format PIL knows",
        "  bee/strip.png: 600 x 3 pixels is too long and thin (more than 50 : 1)",
    ]
    bad = [1, 4, 10]
    assert cache.usable_rows(cache.teachers).tolist() == [row for row in range(11) if row not in bad]
    maps = np.asarray(zarr.open_array(cache.path / "teachers/fake-a/spatial", mode="r")[0])
    assert np.flatnonzero(np.isnan(maps).any(axis=(1, 2, 3))).tolist() == bad
    assert np.flatnonzero(np.isnan(maps).all(axis=(1, 2, 3))).tolist() == bad
    assert cache.sizes_hw[bad].tolist() == [[0, 0]] * 3
    assert report.results[0].images == 8
    mean, _ = cache.teachers["fake-a"].spatial_mean_std()
    np.testing.assert_allclose(mean, np.nanmean(maps.astype(np.float64), axis=(0, 1, 2)), atol=2e-3)


def test_a_shard_of_unusable_images_only_is_a_shard_of_holes(build: Build, tmp_path: Path, ten_images: Path) -> None:
    shutil.copytree(ten_images, tmp_path / "photos")
    for number in range(3):
        (tmp_path / f"photos/ant/{number}.png").write_bytes(b"")
    cache = build(images=(str(tmp_path / "photos"),)).cache
    assert cache.usable_rows(cache.teachers).tolist() == list(range(3, 10))
    assert np.isfinite(cache.teachers["fake-a"].spatial_mean_std()[0]).all()


def test_a_cache_without_any_usable_image_is_one_error(build: Build, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(5):
        (tmp_path / f"photos/{number}.jpg").write_bytes(b"nothing")
    for _ in range(2):
        with pytest.raises(
            SourceError, match=r"none of the 5 images can be used: radio-cache info .*out\.zarr --failures"
        ):
            build(images=(str(tmp_path / "photos"),))


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("kind", ["file", "folder", "zarr group"])
def test_an_output_that_is_something_else_is_left_alone(build: Build, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out.zarr"
    match kind:
        case "file":
            out.write_text("mine")
        case "folder":
            out.mkdir()
            (out / "thesis.tex").write_text("mine")
        case _:
            zarr.create_group(out).create_array("theirs", shape=(3,), dtype="f4")
    before = tree(tmp_path)
    with pytest.raises(NotACacheError, match=r"out\.zarr exists and is not empty: choose another place, or remove it"):
        build()
    assert tree(tmp_path) == before


def copied_images(tmp_path: Path, ten_images: Path) -> Path:
    return Path(shutil.copytree(ten_images, tmp_path / "photos"))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            lambda folder: shutil.copy(folder / "ant/0.png", folder / "ant/new.png"),
            r"1 new image \(such as ant/new\.png\)",
        ),
        (lambda folder: (folder / "ant/0.png").unlink(), r"1 missing \(such as ant/0\.png\)"),
        (lambda folder: (folder / "ant/0.png").rename(folder / "bee/z.png"), r"1 new image .*bee/z.*1 missing .*ant/0"),
    ],
    ids=["added", "removed", "moved"],
)
def test_images_that_came_or_went_since_are_named(
    build: Build, tmp_path: Path, ten_images: Path, change: Callable[[Path], object], difference: str
) -> None:
    folder = copied_images(tmp_path, ten_images)
    build(images=(str(folder),))
    before = tree(tmp_path / "out.zarr")
    change(folder)
    with pytest.raises(StaleCacheError, match=rf"{difference}.*[Cc]hoose another --out\Z"):
        build(images=(str(folder),))
    assert tree(tmp_path / "out.zarr") == before


@pytest.mark.parametrize(
    ("then", "now", "cause"),
    [
        ({"shuffle_seed": 3}, {}, "--shuffle-seed was 3 when the cache was made, and is not given now"),
        ({}, {"shuffle_seed": 0}, "--shuffle-seed was not given when the cache was made, and is 0 now"),
        ({"limit": 8}, {"limit": 5}, "--limit was 8 when the cache was made, and is 5 now"),
        ({"filters": ("bee/*",)}, {"filters": ("!bee/*",)}, r"--filter was bee/\* when .*, and is !bee/\* now"),
    ],
)
def test_options_that_choose_other_images_are_named_with_both_values(
    build: Build, then: dict[str, Any], now: dict[str, Any], cause: str
) -> None:
    build(**then)
    with pytest.raises(StaleCacheError, match=rf"{cause}: give the same as then, choose another --out"):
        build(**now)


def test_a_compiled_teacher_and_another_are_not_mixed(
    build: Build, built: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch, "compile", lambda call: call)
    compiled = dict.fromkeys(("fake-a", "fake-maps"), TeacherOptions(compiled=True))
    with pytest.raises(StaleCacheError, match=r"'fake-a' was built without --compile, and this run is with it"):
        build(teachers=compiled)
    build(teachers=compiled, out=tmp_path / "compiled.zarr")
    with pytest.raises(
        StaleCacheError, match=r"was built with --compile, and this run is without it.*Run with --compile"
    ):
        build(out=tmp_path / "compiled.zarr")
    build(teachers=compiled, out=tmp_path / "compiled.zarr")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, r"c/0/2/0/0/0 is gone, and the receipt of its shard says \d+ bytes: radio-cache repair"),
        (
            lambda file: file.write_bytes(b"short"),
            r"c/0/2/0/0/0 has 5 bytes, and the receipt of its shard says \d+ bytes",
        ),
    ],
)
def test_a_build_does_not_call_a_cache_complete_whose_files_are_gone(
    build: Build, built: Cache, damage: Callable[[Path], object], message: str
) -> None:
    damage(built.path / "teachers/fake-a/spatial/c/0/2/0/0/0")
    with pytest.raises(CorruptShardError, match=message):
        build()
    assert build(teachers={"fake-maps": TeacherOptions()}).there.num_shards == 8  # which has nothing to do with it


def test_an_image_whose_content_changed_since_stops_a_teacher_added_later(
    build: Build, tmp_path: Path, ten_images: Path
) -> None:
    folder = copied_images(tmp_path, ten_images)
    build(images=(str(folder),), teachers={"fake-a": TeacherOptions()})
    shutil.copy(folder / "ant/0.png", folder / "ant/2.png")
    with pytest.raises(RadioCacheError, match=r"image ant/2\.png was fine .* has changed since the cache was built"):
        build(images=(str(folder),))


def test_the_same_images_elsewhere_are_recognised_by_their_digests(
    build: Build, built: Cache, tmp_path: Path, ten_images: Path
) -> None:
    folder = copied_images(tmp_path, ten_images)
    before = {path: path.read_bytes() for path in built.path.rglob("*/c/**/*") if path.is_file()}
    said: list[str] = []
    cache = build(images=(str(folder),), on_message=said.append).cache
    assert cache.meta.containers[0].path == str(folder)
    assert {path: path.read_bytes() for path in built.path.rglob("*/c/**/*") if path.is_file()} == before
    assert any(f"are in {folder} now (before: {ten_images})" in sentence for sentence in said)
    assert cache.read_file(0) == (folder / "ant/0.png").read_bytes()


def test_other_images_under_the_same_names_are_not_taken_for_moved_ones(
    build: Build, built: Cache, tmp_path: Path, ten_images: Path
) -> None:
    folder = copied_images(tmp_path, ten_images)
    shutil.copy(folder / "ant/0.png", folder / "ant/1.png")
    with pytest.raises(StaleCacheError, match=r"image ant/1\.png is not the same in .*Nothing was changed"):
        build(images=(str(folder),))
    assert Cache(built.path).meta == built.meta


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"shard_images": 4}, r"out\.zarr was built with --shard-images 3, this run asks for 4"),
        ({"max_pixels": 10**6}, r"out\.zarr was built with --max-pixels 89478485, this run asks for 1000000"),
    ],
    ids=["shards", "pixels"],
)
def test_another_setting_than_the_caches_is_named_with_both_values(
    build: Build, built: Cache, setting: dict[str, int], message: str
) -> None:
    with pytest.raises(StaleCacheError, match=message):
        build(**setting)


@pytest.mark.parametrize(
    ("options", "differences"),
    [
        (TeacherOptions(size_px=40), ["geometry.grid_hw is (4, 4), this run asks for (5, 5)", "geometry.input_hw is"]),
        (TeacherOptions(fit="pad"), ["geometry.fit is squash, this run asks for pad"]),
        (TeacherOptions(dtype="bfloat16"), ["compute_dtype is float32, this run asks for bfloat16"]),
        (TeacherOptions(weights=Path(__file__)), ["weights_sha256 is "]),
    ],
    ids=["size", "fit", "dtype", "weights"],
)
def test_another_teacher_under_the_same_name_is_refused_with_the_fields(
    build: Build, built: Cache, reference: Path, options: TeacherOptions, differences: list[str]
) -> None:
    with pytest.raises(StaleCacheError, match=r"out\.zarr, teacher 'fake-a': .*Ask for what the cache holds") as caught:
        build(teachers={"fake-a": options})
    for difference in differences:
        assert difference in str(caught.value)
    assert tree(built.path) == tree(reference)


def test_the_same_weights_at_another_path_are_the_same_weights(
    build: Build, tmp_path: Path, computed: CountedCalls
) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w.pth").write_bytes(b"the same")
        build(teachers={"fake-a": TeacherOptions(weights=tmp_path / name / "w.pth")})
    assert computed.images == 10


def test_a_wrong_second_teacher_is_refused_before_any_work_is_done(build: Build, tmp_path: Path) -> None:
    with pytest.raises(TeacherWeightsError, match="is a folder, not a weights file"):
        build(teachers={"fake-a": TeacherOptions(), "fake-maps": TeacherOptions(weights=tmp_path)})
    with pytest.raises(UnknownTeacherError):
        build(teachers={"fake-a": TeacherOptions(), "fake-c": TeacherOptions()})
    (tmp_path / "w.pth").write_bytes(b"damaged")
    with pytest.raises(TeacherWeightsError, match=r"w\.pth"):
        build(teachers={"fake-a": TeacherOptions(), "sam-vit-b": TeacherOptions(weights=tmp_path / "w.pth")})
    assert not (tmp_path / "out.zarr").exists()


def test_one_teacher_at_a_time_is_in_memory(build: Build, fake_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    at_once: list[int] = []
    original = fake_module.FakeTeacher.__init__

    def counted(self: Any, *args: Any) -> None:
        alive.add(self)
        at_once.append(len(alive))
        original(self, *args)

    monkeypatch.setattr(fake_module.FakeTeacher, "__init__", counted)
    level = TeacherOptions(size_px=40, level_of="fake-a")
    teachers = {"fake-a": TeacherOptions(), "fake-a@40": level, "fake-maps": TeacherOptions()}
    assert [result.images for result in build(teachers=teachers).results] == [10, 10, 10]
    assert len(at_once) == 5  # two are checked and let go, the first is kept, the two come again
    assert max(at_once) == 1


def test_a_second_teacher_unlike_the_cached_one_is_refused_before_the_first_computes(
    build: Build, computed: CountedCalls
) -> None:
    build(teachers={"fake-maps": TeacherOptions()})
    with pytest.raises(StaleCacheError, match="teacher 'fake-maps': geometry"):
        build(teachers={"fake-a": TeacherOptions(), "fake-maps": TeacherOptions(size_px=40)})
    assert computed.images == 10


FAULTS = {"nan": float("nan"), "inf": float("inf"), "minus inf": float("-inf"), "huge": 3e38}
FAULTY_CODECS = {
    "half": CodecRequest(name="half"),
    "int8": CodecRequest(name="int8"),
    "packed": CodecRequest(),
    "zstd": CodecRequest(packing="zstd"),
    "step": CodecRequest(packing="zstd", step=0.5),
}


@pytest.fixture
def faulty(fake_module: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """faulty(value, "spatial"): the teacher returns the value in one place for the one image whose pixels are all white."""
    original = fake_module.FakeTeacher.__call__

    def set_up(value: float, where: str) -> None:
        def call(self: Any, images: torch.Tensor) -> Any:
            out = original(self, images)
            white = (images > 2).flatten(1).all(dim=1)
            features = getattr(out, where).clone()
            if where == "spatial":
                features[white, 1, 2, 3] = value
            else:
                features[white, 1] = value
            return out._replace(**{where: features})

        monkeypatch.setattr(fake_module.FakeTeacher, "__call__", call)

    return set_up


@pytest.fixture(scope="module")
def images_with_a_white_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty images, one of them white."""
    folder = tmp_path_factory.mktemp("white")
    write_images(folder, classes=("ant", "bee"), per_class=40, size=24)
    Image.new("RGB", (24, 24), "white").save(folder / "bee" / "17.png")
    return folder


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("codec", FAULTY_CODECS)
def test_features_that_cannot_be_stored_name_the_teacher_and_the_image(
    build: Build, faulty: Callable[..., None], images_with_a_white_one: Path, codec: str, fault: str
) -> None:
    faulty(FAULTS[fault], "spatial")
    with pytest.raises(CodecError) as raised:
        build(
            images=(str(images_with_a_white_one),),
            shard_images=16,
            batch_size=8,
            teachers={"fake-a": TeacherOptions(codec=CodecRecord.of_request(FAULTY_CODECS[codec]))},
        )
    assert re.search(r"out\.zarr, teacher 'fake-a', image bee/17\.png: .*--dtype float32", str(raised.value))
    assert "--filter '!bee/17.png'" in str(raised.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_summary_that_cannot_be_stored_names_the_teacher_and_the_image(
    build: Build, faulty: Callable[..., None], images_with_a_white_one: Path, fault: str
) -> None:
    faulty(FAULTS[fault], "summary")
    with pytest.raises(CodecError, match=r"out\.zarr, teacher 'fake-a', image bee/17\.png: summary: codec half"):
        build(images=(str(images_with_a_white_one),), shard_images=16, teachers={"fake-a": TeacherOptions()})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"shard_images": 0}, "shard images must be at least 1, not 0"),
        ({"batch_size": -1}, "batch size must be at least 1, not -1"),
        ({"threads": 0}, "threads must be at least 1, not 0"),
        ({"limit": 0}, "limit must be at least 1, not 0"),
        ({"images": ()}, "no --images: name a folder of images"),
        ({"teachers": {}}, "no --teacher: name at least one"),
    ],
)
def test_impossible_settings_are_refused(build: Build, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**setting)


def test_a_cache_made_for_tests_is_one_the_build_would_go_on_with(build: Build, tmp_path: Path) -> None:
    """`radio_cache.testing` and the build write one format."""
    write_images(tmp_path / "photos", per_class=2)
    tiny = make_tiny_cache(tmp_path / "out.zarr", tmp_path / "photos", shard_images=3)
    config = {"images": (str(tmp_path / "photos"),), "max_pixels": tiny.meta.max_pixels}
    cache = build(**config, teachers={"fake-maps": TeacherOptions()}).cache
    assert list(cache.teachers) == ["fake-a", "fake-b", "fake-maps"]
    assert cache.usable_rows(cache.teachers).tolist() == [0, 1, 2, 3]
    assert replace(cache.meta, creator="") == replace(tiny.meta, creator="")


# ---------------------------------------------------------------- codecs


def stored_as(request: CodecRequest) -> dict[str, TeacherOptions]:
    return dict.fromkeys(("fake-a", "fake-maps"), TeacherOptions(codec=CodecRecord.of_request(request)))


@pytest.fixture(scope="module")
def eighty_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    write_images(folder, classes=("ant", "bee"), per_class=40)
    return folder


@pytest.mark.parametrize(
    "request_", [CodecRequest(name="int8"), CodecRequest(), CodecRequest(packing="zstd", fidelity=0.999)]
)
def test_maps_of_every_codec_keep_what_was_asked_and_the_receipts_say_so(
    build: Build, eighty_images: Path, tmp_path: Path, request_: CodecRequest
) -> None:
    exact = build(
        images=(str(eighty_images),), out=tmp_path / "exact.zarr", teachers=stored_as(CodecRequest(name="half"))
    ).cache
    cache = build(images=(str(eighty_images),), out=tmp_path / "coded.zarr", teachers=stored_as(request_)).cache
    for name in ("fake-a", "fake-maps"):
        found = measure_fidelity(
            exact.teachers[name].maps(range(80)).reshape(-1, 5), cache.teachers[name].maps(range(80)).reshape(-1, 5)
        )
        said = cache.teachers[name].fidelity()
        assert said is not None
        assert said.num_tokens == found.num_tokens
        assert said.cosine == pytest.approx(found.cosine, abs=1e-4)
        assert said.relative_mse == pytest.approx(found.relative_mse, rel=0.05, abs=1e-5)
        assert found.cosine > 0.98
        mean, std = cache.teachers[name].spatial_mean_std()
        np.testing.assert_allclose([mean, std], exact.teachers[name].spatial_mean_std(), atol=1e-4)


def test_a_codec_once_chosen_stays_and_another_is_refused(build: Build, eighty_images: Path, tmp_path: Path) -> None:
    images, out = (str(eighty_images),), tmp_path / "c.zarr"
    spec = build(images=images, out=out, teachers=stored_as(CodecRequest())).cache.teachers["fake-a"].spec
    assert build(images=images, out=out).cache.teachers["fake-a"].spec == spec
    assert build(images=images, out=out, teachers=stored_as(CodecRequest())).cache.teachers["fake-a"].spec == spec
    with pytest.raises(StaleCacheError, match=r"codec\.fidelity is 0\.99, this run asks for 0\.999"):
        build(images=images, out=out, teachers=stored_as(CodecRequest(fidelity=0.999)))


def test_damaged_codec_arrays_are_named(build: Build, eighty_images: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.zarr"
    build(images=(str(eighty_images),), out=out, teachers=stored_as(CodecRequest()))
    shutil.rmtree(out / "teachers/fake-a/transform/basis")
    with pytest.raises(StoreError, match=r"transform is damaged.*'basis' is not there"):
        Cache(out).teachers["fake-a"].maps([0])


# ---------------------------------------------------------------- growing


@pytest.fixture
def seven(build: Build) -> Cache:
    """The first seven of the ten images, in shards of three: the last one is short."""
    return build(limit=7).cache


def test_a_listing_that_goes_on_where_the_cache_ends_makes_it_longer(
    build: Build, seven: Cache, reference: Path, fake_module: Any
) -> None:
    before = seven.teachers["fake-a"].maps(range(7))
    said: list[str] = []
    report = build(on_message=said.append)
    assert f"{seven.url}: 3 images are added to the 7 that are there" in said
    assert [result.images for result in report.results] == [4, 4]  # the last short shard is made again
    whole = Cache(reference)
    for name, teacher in report.cache.teachers.items():
        np.testing.assert_array_equal(teacher.codes(range(10)), whole.teachers[name].codes(range(10)))
        np.testing.assert_array_equal(teacher.spatial_mean_std(), whole.teachers[name].spatial_mean_std())
    np.testing.assert_array_equal(report.cache.teachers["fake-a"].maps(range(7)), before)
    assert report.cache.index.keys == whole.index.keys
    assert report.cache.meta == whole.meta
    maps = np.asarray(zarr.open_array(report.cache.path / "teachers/fake-a/spatial", mode="r")[0])
    np.testing.assert_array_equal(maps, whole.teachers["fake-a"].codes(range(10)))
    # What the shorter cache had is still there for whoever has it open.
    assert list(seven.index.keys) == list(whole.index.keys)[:7]
    np.testing.assert_array_equal(seven.teachers["fake-a"].maps(range(7)), before)


def test_a_shorter_listing_is_refused(build: Build, seven: Cache) -> None:
    with pytest.raises(StaleCacheError, match="2 missing"):
        build(limit=5)
    assert Cache(seven.path).num_images == 7


@pytest.mark.slow
def test_killed_at_any_write_a_growing_cache_is_the_old_one_or_the_new_one(
    build: Build, seven: Cache, tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = Cache(reference), tmp_path / "killed.zarr"
    change = {name: getattr(LocalStorage, name) for name in ("write", "delete", "delete_tree")}
    sizes: list[int] = []
    for kill_after in range(100):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(seven.path, out)
        left = iter(range(kill_after))

        def killed(original: Callable[..., None], left: Iterator[int] = left) -> Callable[..., None]:
            def run(*given: Any) -> None:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                original(*given)

            return run

        for name, original in change.items():
            monkeypatch.setattr(LocalStorage, name, killed(original))
        finished = False
        try:
            build(out=out)
            finished = True
        except KeyboardInterrupt:
            pass
        for name, original in change.items():
            monkeypatch.setattr(LocalStorage, name, original)
        cache = Cache(out)
        sizes.append(cache.num_images)
        assert not verify_cache(cache, deep=True).damages, f"killed after {kill_after} changes"
        for name, teacher in cache.teachers.items():
            rows = cache.usable_rows([name])
            assert len(rows) >= 6  # the short shard's image may be between two receipts
            np.testing.assert_array_equal(teacher.codes(rows), whole.teachers[name].codes(rows))
        grown = build(out=out).cache
        for name, teacher in grown.teachers.items():
            np.testing.assert_array_equal(teacher.codes(range(10)), whole.teachers[name].codes(range(10)))
        assert grown.meta == whole.meta
        assert verify_cache(grown, deep=True).ok
        if finished:
            break
    assert set(sizes) == {7, 10}
    assert sizes == sorted(sizes)
    assert len(sizes) > 30


def test_a_teacher_that_is_refused_leaves_the_cache_as_long_as_it_was(build: Build, seven: Cache) -> None:
    other = {"fake-a": TeacherOptions(size_px=48)}
    with pytest.raises(StaleCacheError, match="input_hw"):
        build(teachers=other)
    assert Cache(seven.url).num_images == 7
