"""`--log-json`: what a build did, line by line, for other programs."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cache_builder.build import BuildReport
from cache_builder.pipeline.events import JsonLinesFile, UnitCounts
from cache_builder.teachers import TeacherOptions
from radio_cache.errors import ConfigError
from radio_cache.receipts import drop_receipt, read_receipt

Build = Callable[..., BuildReport]

ROWS = [3, 3, 3, 1]
"""Images in the shards of the ten."""


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def shards(file: Path, unit: str) -> list[int]:
    return [line["shard"] for line in lines(file) if line["event"] == "shard" and line["unit"] == unit]


def test_every_shard_and_every_teacher_is_one_line(build: Build, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    build(log_json=log)
    found = lines(log)
    assert [(line["event"], line["unit"]) for line in found] == [
        *[("shard", "images")] * 4,
        ("scan", "images"),
        *[("shard", "fake-a")] * 4,
        ("teacher", "fake-a"),
        *[("shard", "fake-maps")] * 4,
        ("teacher", "fake-maps"),
    ]
    for unit in ("images", "fake-a", "fake-maps"):
        own = [line for line in found if line["unit"] == unit]
        assert shards(log, unit) == [0, 1, 2, 3]
        assert [line["images"] for line in own] == [*ROWS, 10]
        assert own[-1]["bytes"] == sum(line["bytes"] for line in own[:-1]) > 0
        assert own[-1]["images_per_s"] == pytest.approx(10 / own[-1]["seconds"], rel=0.1)
    by_stage = [line["stage_seconds"] for line in found if line["unit"] == "fake-a"]
    assert set(by_stage[-1]) >= {"decode", "teacher", "encode", "write", "wait_device"}
    assert sum(stages["decode"] for stages in by_stage[:-1]) <= by_stage[-1]["decode"] + 0.01


def test_bytes_are_those_of_the_files_of_the_shard(build: Build, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    cache = build(log_json=log).cache
    told = [line["bytes"] for line in lines(log) if line["event"] == "shard" and line["unit"] == "fake-a"]
    receipts = [read_receipt(cache.storage, "fake-a", shard) for shard in range(4)]
    assert told == [sum(file.num_bytes for file in one.files) for one in receipts if one]


def test_failures_are_counted(build: Build, tmp_path: Path) -> None:
    images, log = tmp_path / "images", tmp_path / "log.jsonl"
    images.mkdir()
    for number in range(3):
        Image.new("RGB", (40, 40), (number, 9, 9)).save(images / f"{number}.png")
    (images / "1.png").write_bytes(b"no image")
    build(images=(str(images),), teachers={"fake-a": TeacherOptions()}, log_json=log)
    assert [(line["images"], line["failures"]) for line in lines(log)] == [(2, 1)] * 4


def test_a_build_that_goes_on_appends_what_it_did_itself(build: Build, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    cache = build(log_json=log).cache
    before = log.read_bytes()
    drop_receipt(cache.storage, "fake-a", 2)
    build(log_json=log)
    assert log.read_bytes().startswith(before)
    again = [json.loads(line) for line in log.read_bytes()[len(before) :].splitlines()]
    assert [(line["event"], line["unit"], line["images"]) for line in again] == [
        ("shard", "fake-a", 3),
        ("teacher", "fake-a", 3),
        ("teacher", "fake-maps", 0),
    ]


def test_after_a_line_that_was_cut_short_the_next_one_is_whole(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"event": "sha')
    JsonLinesFile(log).write("teacher", unit="x")
    cut, whole = log.read_text().splitlines()
    assert cut == '{"event": "sha'
    assert json.loads(whole)["unit"] == "x"


def test_two_builds_may_share_a_file(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"

    def build(own: JsonLinesFile) -> None:
        for _ in range(50):
            own.write("shard", unit="u" * 999)

    threads = [threading.Thread(target=build, args=(JsonLinesFile(log),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [line["unit"] for line in lines(log)] == ["u" * 999] * 200


@pytest.mark.parametrize("place", ["nowhere/log.jsonl", "."])
def test_a_file_that_cannot_be_written_is_refused_before_any_work(build: Build, tmp_path: Path, place: str) -> None:
    with pytest.raises(ConfigError, match=r"--log-json .*(No such file|Is a directory)"):
        build(log_json=tmp_path / place)
    assert not (tmp_path / "out.zarr").exists()


def test_the_progress_line_says_bytes_and_what_is_unusable(build: Build, tmp_path: Path) -> None:
    unit = UnitCounts(JsonLinesFile(None), "fake-a")
    assert unit.note == "0 B written"
    receipt = read_receipt(build().cache.storage, "fake-a", 0)
    assert receipt is not None
    unit.add(receipt)
    assert unit.note == f"{sum(file.num_bytes for file in receipt.files)} B written"
    unit.failures = 2
    assert unit.note.endswith(" B written, 2 unusable")
