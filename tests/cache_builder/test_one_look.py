"""A first build decodes every image once, for the scan and for the first teacher, and stores what two passes would."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import cache_builder.build
import cache_builder.pipeline.scan
import cache_builder.pipeline.shards
import cache_builder.pipeline.views
from cache_builder.build import BuildReport
from cache_builder.build_output import missing_shards
from cache_builder.commands.build_options import view_sampling
from cache_builder.pipeline.events import ReportedEvents
from cache_builder.pipeline.passes import scan_images, usable_sample
from cache_builder.sources.listing_record import LISTING_FILE as LISTING
from cache_builder.teachers import TeacherOptions
from radio_cache import Cache
from radio_cache.codecs.calibrate import CodecRequest
from radio_cache.errors import SourceError
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.schema import IMAGES_UNIT
from radio_cache.testing import write_images

Build = Callable[..., BuildReport]

NUM_IMAGES = 101


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough images to calibrate the fake teachers' codec on; three cannot be used, of which two are a shard's last."""
    folder = tmp_path_factory.mktemp("many")
    write_images(folder, classes=("ant", "bee"), per_class=50, size=37)
    Image.new("RGB", (600, 3)).save(folder / "bee" / "strip.png")
    for name in ("ant/4.png", "ant/5.png"):
        (folder / name).write_bytes(b"no image")
    return folder


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each file that is decoded, one by one."""
    sizes: list[int] = []
    original = cache_builder.pipeline.scan.decode_image

    def count(data: bytes, **options: Any) -> Image.Image:
        sizes.append(len(data))
        return original(data, **options)

    monkeypatch.setattr(cache_builder.pipeline.scan, "decode_image", count)
    monkeypatch.setattr(cache_builder.pipeline.views, "decode_image", count)
    return sizes


def half(views: int = 1) -> TeacherOptions:
    sampling = view_sampling(flipped=True) if views > 1 else None
    return TeacherOptions(codec=CodecRecord.of_request(CodecRequest(name="half")), views=views, view_sampling=sampling)


def tree(path: Path) -> dict[str, bytes]:
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and file.name != LISTING)
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on all images are scanned before a teacher is registered, as worker processes do it."""
    sample, scanned = cache_builder.build.codec_sample, []

    def scan_first(cache: Cache, *arguments: Any) -> list[int] | None:
        if cache.url not in scanned:
            scanned.append(cache.url)
            return None
        return sample(cache, *arguments)

    monkeypatch.setattr(cache_builder.build, "codec_sample", scan_first)


@pytest.mark.parametrize(
    "options", [TeacherOptions(), half(), half(views=3)], ids=["calibrated", "half", "several views"]
)
def test_one_look_stores_the_bytes_of_two_passes(
    build: Build,
    many: Path,
    tmp_path: Path,
    decoded: list[int],
    monkeypatch: pytest.MonkeyPatch,
    options: TeacherOptions,
) -> None:
    images, teachers = (str(many),), {"fake-a": options, "fake-maps": options}
    report = build(images=images, teachers=teachers)
    once = len(decoded)
    assert [result.images for result in report.results] == [NUM_IMAGES - 3] * 2
    with monkeypatch.context() as patched:
        two_passes(patched)
        build(images=images, teachers=teachers, out=tmp_path / "two.zarr")
    assert tree(tmp_path / "out.zarr") == tree(tmp_path / "two.zarr")
    # Saved: the images of a pass, less those that were decoded to choose a codec, or to see that there is one.
    assert len(decoded) - once >= once + NUM_IMAGES - 3 - (80 if not options.codec.is_chosen else 2)


def test_what_cannot_be_used_is_told_after_the_first_teacher_and_logged(
    build: Build, many: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    log = tmp_path / "log.jsonl"
    report = build(images=(str(many),), teachers={"fake-a": half()}, on_message=said.append, log_json=log)
    assert report.unusable == 3
    assert "3 of 101 images cannot be used and are left out:" in said
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for unit, event in (("images", "scan"), ("fake-a", "teacher")):
        own = [line for line in lines if line["unit"] == unit]
        assert [line["shard"] for line in own[:-1]] == list(range(34))
        assert (own[-1]["event"], own[-1]["images"], own[-1]["failures"]) == (event, 98, 3)


def test_a_build_that_was_stopped_goes_on_where_each_unit_is(
    build: Build, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(images=(str(many),), teachers={"fake-a": half()}).cache
    original, scanned = cache_builder.pipeline.shards.write_scan_results, 0

    def fail_later(*arguments: Any) -> Any:
        nonlocal scanned
        scanned += 1
        if scanned > 5:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    out = tmp_path / "stopped.zarr"
    with monkeypatch.context() as patched:
        patched.setattr(cache_builder.pipeline.shards, "write_scan_results", fail_later)
        with pytest.raises(OSError, match="No space left"):
            build(images=(str(many),), teachers={"fake-a": half()}, out=out)
    assert missing_shards(Cache(out), IMAGES_UNIT) == missing_shards(Cache(out), "fake-a") == list(range(5, 34))
    (out / "receipts/fake-a/000002.json").unlink()
    (out / "receipts/images/000003.json").unlink()  # of a shard that the teacher has
    build(images=(str(many),), teachers={"fake-a": half()}, out=out)
    assert tree(out) == tree(whole.path)


def test_if_hardly_any_image_can_be_used_all_are_looked_at_before_a_teacher_joins(build: Build, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    write_images(folder, classes=("ant",), per_class=2)
    for number in range(150):
        (folder / f"bad{number:03d}.png").write_bytes(b"no image")
    cache = build(images=(str(folder),), teachers={"fake-a": TeacherOptions()}).cache
    assert cache.usable_rows(["fake-a"]).tolist() == [0, 1]
    assert cache.teachers["fake-a"].spec.codec.label == "half"
    for file in (folder / "ant").iterdir():
        file.write_bytes(b"no image either")
    with pytest.raises(SourceError, match="none of the 152 images can be used"):
        build(images=(str(folder),), teachers={"fake-a": half()}, out=tmp_path / "none.zarr")
    assert not Cache(tmp_path / "none.zarr").teachers


def test_a_sample_is_the_same_before_and_after_the_scan(
    build: Build, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cache_builder.build, "register_teacher", stop)
        with pytest.raises(KeyboardInterrupt):
            build(images=(str(many),), teachers={"fake-a": TeacherOptions()})
    unseen = Cache(tmp_path / "out.zarr")
    assert len(missing_shards(unseen, IMAGES_UNIT)) == 34
    with ThreadPoolExecutor(2) as pool:
        before = usable_sample(unseen, "fake-a", 64, pool)
        assert usable_sample(unseen, "fake-a", 99, pool) is None  # there are 98
        scan_images(unseen, pool, ReportedEvents(print))
        seen = Cache(unseen.storage)
        assert before == usable_sample(seen, "fake-a", 64, pool)
        assert sorted(usable_sample(seen, "fake-a", 99, pool) or []) == seen.usable_rows().tolist()
    assert before is not None
    assert len(set(before)) == 64
    assert not {failure.row for failure in seen.failures()} & set(before)
