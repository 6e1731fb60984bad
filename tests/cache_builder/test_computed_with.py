"""What decides the last bits of a teacher's shards is recorded with it, and builds of one teacher do not tear its shards."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cache_builder.pipeline.passes
import cache_builder.pipeline.shards
from cache_builder.build import BuildReport, build_cache
from cache_builder.build_config import BuildConfig
from cache_builder.computed_with import BATCH, DEVICE, device_name, recorded_batch
from cache_builder.teachers import TeacherOptions
from radio_cache import Cache
from radio_cache.checks.verify import drop_teacher, verify_cache
from radio_cache.codecs.calibrate import CodecRequest
from radio_cache.errors import StaleCacheError, StoreError
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.schema import ATTRIBUTES_KEY
from radio_cache.format.strict_json import parse_json
from radio_cache.receipts import drop_receipt
from radio_cache.storage.local import locked
from radio_cache.testing import write_images

Build = Callable[..., BuildReport]
ONE = {"fake-a": TeacherOptions()}
INT8 = TeacherOptions(codec=CodecRecord.of_request(CodecRequest(name="int8")))


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch, fake_module: Any) -> list[int]:
    """Sizes of the batches that fake teachers see."""
    seen: list[int] = []
    call = fake_module.FakeTeacher.__call__

    def watched(self: Any, images: torch.Tensor) -> Any:
        seen.append(len(images))
        return call(self, images)

    monkeypatch.setattr(fake_module.FakeTeacher, "__call__", watched)
    return seen


@pytest.fixture
def begun(build: Build) -> Cache:
    """One teacher in batches of two, whose last shard is missing."""
    cache = build(teachers=ONE, batch_size=2).cache
    drop_receipt(cache.storage, "fake-a", 3)
    drop_receipt(cache.storage, "fake-a", 0)
    return cache


def test_the_batch_size_and_the_device_are_recorded_with_the_teacher(begun: Cache) -> None:
    software = begun.teachers["fake-a"].spec.software
    assert (software[BATCH], software[DEVICE]) == ("2", device_name("cpu"))
    assert recorded_batch(begun, "fake-a") == 2
    assert recorded_batch(begun, "fake-maps") is None


@pytest.mark.parametrize("asked", [{"batch_size": None}, {"batch_size": "auto"}, {"batch_size": 2}])
def test_a_teacher_goes_on_in_the_batches_it_was_begun_with(
    begun: Cache, build: Build, batches: list[int], asked: dict[str, Any]
) -> None:
    said: list[str] = []
    build(teachers=ONE, **asked, on_message=said.append)
    assert batches == [2, 1, 1]
    note = "fake-a: batches of 2 images, as it was begun with"
    assert said.count(note) == (asked["batch_size"] != 2)


def test_another_number_is_refused_with_both_until_the_teacher_is_complete(
    begun: Cache, build: Build, batches: list[int]
) -> None:
    with pytest.raises(
        StaleCacheError, match=r"begun in batches of 2 images, this run asks for --batch-size 3: .*ask for 2"
    ):
        build(teachers=ONE, batch_size=3)
    assert batches == []
    build(teachers=ONE)
    batches.clear()
    both = build(teachers=ONE | {"fake-maps": TeacherOptions()}, batch_size=3).cache  # nothing is left of the first one
    assert set(batches) == {3, 1}
    assert recorded_batch(both, "fake-maps") == 3


def test_a_cache_that_grows_goes_on_in_the_batches_it_was_begun_with(
    build: Build, tmp_path: Path, batches: list[int]
) -> None:
    write_images(tmp_path / "photos", classes=("a",), per_class=4, size=41)
    config = {"images": (str(tmp_path / "photos"),), "teachers": ONE}
    build(**config, batch_size=2)
    write_images(tmp_path / "photos", classes=("b",), per_class=3, size=41)
    with pytest.raises(StaleCacheError, match="--batch-size 3"):
        build(**config, batch_size=3)
    batches.clear()
    build(**config, batch_size=None)
    assert max(batches) == 2


def test_caches_of_before_say_nothing_and_go_on_as_asked(begun: Cache, build: Build, batches: list[int]) -> None:
    document = begun.storage.local_path("teachers/fake-a/zarr.json")
    spec = begun.teachers["fake-a"].spec
    data = parse_json(document.read_bytes())
    older = replace(spec, software={"torch": spec.software["torch"]})
    data["attributes"][ATTRIBUTES_KEY] = older.to_json()
    document.write_text(json.dumps(data))
    said: list[str] = []
    build(teachers=ONE, batch_size=3, on_message=said.append)
    assert batches == [3, 1]
    assert not any("begun" in sentence or "otherwise" in sentence for sentence in said)


def test_another_device_or_version_is_told_where_shards_are_missing(
    begun: Cache, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache_builder.computed_with.device_name", lambda device: "another chip")
    said: list[str] = []
    build(teachers=ONE, batch_size=None, on_message=said.append)
    build(teachers=ONE, batch_size=None, on_message=said.append)
    told = [sentence for sentence in said if "computed otherwise" in sentence]
    assert told == [
        f"fake-a: its first shards were computed otherwise (device {device_name('cpu')} then, another chip now): the rest may "
        "differ from them in the last bits"
    ]


# ---------------------------------------------------------------- two builds at once


def test_a_shard_that_another_build_has_committed_meanwhile_is_left_as_it_is(
    fake_module: Any, fake_teachers: object, ten_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.zarr"
    config = BuildConfig(**fake_module.settings(ten_images, out) | {"teachers": ONE, "threads": 1})
    first: list[dict[str, bytes]] = []

    def files() -> dict[str, bytes]:
        return {str(file): file.read_bytes() for file in out.rglob("*") if file.is_file() and "fake-a" in str(file)}

    call = fake_module.FakeTeacher.__call__

    def other_bits(self: Any, images: torch.Tensor) -> Any:
        if not first:  # another build makes the whole cache while this one computes its first batch
            first.append({})
            build_cache(config)
            first[0] = files()
        features = call(self, images)
        return features._replace(spatial=features.spatial + 0.5) if first[0] else features

    monkeypatch.setattr(fake_module.FakeTeacher, "__call__", other_bits)
    build_cache(config)
    assert files() == first[0]
    assert verify_cache(Cache(out), deep=True).ok


def test_a_build_that_comes_second_takes_the_batches_of_the_first(
    build: Build, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both found no teacher in the cache; the other one has made it while this one chose its codec."""
    choose, said = cache_builder.pipeline.passes.resolve_codec_request, list[str]()

    def slower(*arguments: Any) -> Any:
        monkeypatch.setattr(cache_builder.pipeline.passes, "resolve_codec_request", choose)
        begun = build(teachers=ONE, batch_size=3, on_message=lambda _: None).cache
        drop_receipt(begun.storage, "fake-a", 0)
        batches.clear()
        return choose(*arguments)

    monkeypatch.setattr(cache_builder.pipeline.passes, "resolve_codec_request", slower)
    build(teachers=ONE, batch_size=2, on_message=said.append)
    assert batches == [3]
    assert "fake-a: batches of 3 images, as another build has just begun it with" in said


def test_a_shard_is_committed_under_a_lock(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    free: list[bool] = []
    write = cache_builder.pipeline.shards._write_spatial

    def watched(writer: Any, cache: Cache, spec: Any, *rest: Any) -> Any:
        with locked(cache.storage.local_path(f"teachers/{spec.name}/spatial"), wait=False) as held:
            free.append(held)
        return write(writer, cache, spec, *rest)

    monkeypatch.setattr(cache_builder.pipeline.shards, "_write_spatial", watched)
    build(teachers=ONE)
    assert free == [False] * 4


# ---------------------------------------------------------------- dropped while it is built


def during(monkeypatch: pytest.MonkeyPatch, fake_module: Any, do: Callable[[], object], *, at: int) -> None:
    """Do something while a fake teacher computes its batch number `at`."""
    call, count = fake_module.FakeTeacher.__call__, [0]

    def watched(self: Any, images: torch.Tensor) -> Any:
        count[0] += 1
        if count[0] == at:
            do()
        return call(self, images)

    monkeypatch.setattr(fake_module.FakeTeacher, "__call__", watched)


def test_a_teacher_that_is_being_built_is_not_dropped(
    build: Build, fake_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []

    def drop() -> None:
        with pytest.raises(
            StoreError, match="teacher 'fake-a' is being built by another process: stop that build"
        ) as told:
            drop_teacher(Cache(tmp_path / "out.zarr"), "fake-a")
        refused.append(str(told.value))

    during(monkeypatch, fake_module, drop, at=4)
    cache = build().cache
    assert len(refused) == 1
    assert verify_cache(cache, deep=True).ok
    drop_teacher(cache, "fake-a")  # now it may be
    assert list(Cache(cache.storage).teachers) == ["fake-maps"]


@pytest.mark.parametrize("at", [1, 2, 4, 7])
@pytest.mark.parametrize("anew", [False, True])
def test_a_teacher_dropped_from_another_machine_stops_the_build_and_the_same_command_builds_it(
    build: Build, fake_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, anew: bool
) -> None:
    def drop() -> None:
        cache = Cache(tmp_path / "out.zarr")
        if "fake-a" not in cache.teachers:
            return
        cache.storage.delete_tree("receipts/fake-a")  # as drop_teacher does, without this machine's lock
        cache.storage.delete_tree("teachers/fake-a")
        if anew:
            build(teachers={"fake-a": INT8}, on_message=lambda _: None)

    during(monkeypatch, fake_module, drop, at=at)
    what = "made anew|dropped" if anew else "dropped"
    with pytest.raises(StaleCacheError, match=f"'fake-a' was ({what}) by another process.*same command"):
        build(threads=1)
    cache = build(teachers={"fake-a": INT8 if anew else TeacherOptions(), "fake-maps": TeacherOptions()}).cache
    report = verify_cache(cache, deep=True)
    assert report.ok
    assert not any(report.missing.values())
