"""What the JSON of a cache means."""

import json
from dataclasses import replace

import pytest

from radio_cache import CacheMeta
from radio_cache.errors import ConfigError, StoreError, UnsupportedFormatError
from radio_cache.format.schema import (
    Container,
    Failure,
    Receipt,
    StoredFile,
    TeacherSpec,
    level_name,
    receipt_path,
    unit_group,
)
from radio_cache.testing import fake_spec

META = CacheMeta(
    num_images=10,
    shard_images=4,
    creator="test",
    class_names=("a", "b"),
    max_pixels=100,
    containers=(Container(kind="folder", path="photos", prefix="photos/"),),
)


def test_rows_are_cut_into_shards_and_the_last_may_be_short() -> None:
    assert META.num_shards == 3
    assert [list(META.shard_rows(shard)) for shard in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert replace(META, num_images=8).num_shards == 2


def test_meta_survives_json() -> None:
    assert CacheMeta.from_json(json.loads(json.dumps(META.to_json()))) == META


def test_a_container_without_a_column_is_written_as_in_the_first_caches() -> None:
    (container,) = META.to_json()["containers"]
    assert container == {"kind": "folder", "path": "photos", "prefix": "photos/"}
    columns = replace(META, containers=(Container(kind="parquet", path="a", prefix="", column="image.bytes"),))
    assert CacheMeta.from_json(json.loads(json.dumps(columns.to_json()))) == columns


def test_a_container_of_a_newer_kind_is_kept_as_it_is() -> None:
    newer = replace(META, containers=(Container(kind="zip", path="a.zip", prefix=""),))
    assert CacheMeta.from_json(json.loads(json.dumps(newer.to_json()))) == newer


def test_a_container_of_a_newer_kind_with_more_to_say_is_refused_with_the_cure() -> None:
    data = META.to_json()
    del data["crc32c"]
    data["containers"] = [{"kind": "zip", "path": "a.zip", "prefix": "", "password": "x"}]
    with pytest.raises(UnsupportedFormatError, match=r"of kind 'zip' with 'password', which .*: install a newer one"):
        CacheMeta.from_json(json.loads(json.dumps(data)))


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_any_other_format_version_is_refused(version: object) -> None:
    with pytest.raises(UnsupportedFormatError, match=f"format version {version!r}, this radio-cache reads version 1"):
        CacheMeta.from_json({**META.to_json(), "format_version": version})


def test_a_receipt_survives_json() -> None:
    receipt = Receipt(
        unit="sam",
        shard=2,
        first_row=8,
        num_rows=2,
        num_tokens=64,
        failures=(Failure(row=9, reason="empty"),),
        files=(StoredFile(path="spatial/c/0/2/0/0/0", num_bytes=12, crc32c=2**32 - 1),),
    )
    assert Receipt.from_json(json.loads(json.dumps(receipt.to_json()))) == receipt


@pytest.mark.parametrize("data", [{}, {"failures": [], "files": []}, {"failures": [{"line": 1}], "files": []}])
def test_a_receipt_with_other_fields_is_a_store_error(data: dict[str, object]) -> None:
    with pytest.raises(StoreError, match="a receipt does not have the fields of format version 1"):
        Receipt.from_json(data)


@pytest.mark.parametrize("name", ["images", "", "Upper", "a/b", "..", "a b", "ä", ".hidden", "x\n"])
def test_a_teacher_name_that_cannot_name_a_group_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a group: use lower case letters, digits"):
        fake_spec(name, summary_dim=None, spatial_dim=1)


def test_a_level_has_a_name_of_its_own_and_says_whose_it_is() -> None:
    spec = fake_spec("dinov2", summary_dim=None, spatial_dim=1)
    level = replace(spec, name=level_name("dinov2", spec.geometry.input_hw), level_of="dinov2")
    assert level.name == f"dinov2@{spec.geometry.input_hw[0]}"
    assert TeacherSpec.from_json(json.loads(json.dumps(level.to_json()))) == level


def test_a_teacher_that_is_no_level_is_written_as_in_the_first_caches() -> None:
    assert "level_of" not in fake_spec("dinov2", summary_dim=None, spatial_dim=1).to_json()


@pytest.mark.parametrize(
    ("name", "level_of"), [("sam", "sam"), ("sam@448", None), ("sam@448", "sam"), ("sam@32", "dinov2"), ("sam@", None)]
)
def test_a_level_named_for_another_size_or_teacher_is_refused(name: str, level_of: str | None) -> None:
    with pytest.raises(ConfigError, match=r"is that of a level, such as|cannot name a group"):
        replace(fake_spec("sam", summary_dim=None, spatial_dim=1), name=name, level_of=level_of)


def test_paths_below_the_cache() -> None:
    assert receipt_path("dinov2", 7) == "receipts/dinov2/000007.json"
    assert unit_group("images") == "images"
    assert unit_group("dinov2") == "teachers/dinov2"
