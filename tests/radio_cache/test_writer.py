"""Writing: what zarr-python reads of it."""

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import zarr
from PIL import Image
from rich.console import Console

from radio_cache import Cache, TeacherSpec
from radio_cache.errors import NotACacheError, StaleCacheError
from radio_cache.format.checksums import CRC_BYTES, crc32c
from radio_cache.format.schema import CacheMeta, Container, ImageStatus
from radio_cache.reader import digest
from radio_cache.testing import fake_features, fake_spec, make_tiny_cache, write_images
from radio_cache.view.info import describe_failures
from radio_cache.writer import ImageIndex, ShardWriter, add_teacher, create_cache, grow_cache


def meta_and_index(num_images: int, shard_images: int = 2, last: str = "") -> tuple[CacheMeta, ImageIndex]:
    meta = CacheMeta(
        num_images=num_images,
        shard_images=shard_images,
        creator="test",
        class_names=("a",),
        max_pixels=100,
        containers=(Container(kind="folder", path="photos", prefix=""),),
    )
    none = np.full(num_images, -1, np.int64)
    keys = [f"Grüße/{number}.png" for number in range(num_images)]
    keys[-1] = last or keys[-1]
    return meta, ImageIndex(keys, none.astype(np.int32), 0 * none.astype(np.int32), none, none)


def empty_cache(path: Path, *, num_images: int = 5, shard_images: int = 2) -> CacheMeta:
    return create_cache(path, *meta_and_index(num_images, shard_images))


# ---------------------------------------------------------------- longer caches


def test_who_has_the_shorter_cache_open_can_read_its_index_even_if_two_processes_made_it_longer(tmp_path: Path) -> None:
    empty_cache(tmp_path / "c")
    reader = Cache(tmp_path / "c")
    for _ in range(2):
        grow_cache(tmp_path / "c", *meta_and_index(8))
    assert reader.index.key(4) == "Grüße/4.png"
    assert Cache(tmp_path / "c").num_images == 8


def test_an_index_that_no_reader_needs_any_more_goes_when_the_cache_grows_again(tmp_path: Path) -> None:
    empty_cache(tmp_path / "c")
    for num_images in (6, 7, 8):
        grow_cache(tmp_path / "c", *meta_and_index(num_images))
    assert len(list((tmp_path / "c/images").glob("index-*"))) == 2


@pytest.mark.parametrize("num_images", [6, 7])
def test_a_cache_that_another_process_made_longer_otherwise_is_left_alone(tmp_path: Path, num_images: int) -> None:
    empty_cache(tmp_path / "c")
    grow_cache(tmp_path / "c", *meta_and_index(7))
    with pytest.raises(StaleCacheError, match="7 are there now: run the same command again"):
        grow_cache(tmp_path / "c", *meta_and_index(num_images, last="other.png"))
    assert Cache(tmp_path / "c").index.key(6) == "Grüße/6.png"


# ---------------------------------------------------------------- what other tools see


def test_zarr_python_reads_the_same_maps_and_summaries_and_holes_are_nan(cache: Cache) -> None:
    group = zarr.open_group(cache.path, mode="r")
    usable = cache.usable_rows(["fake-a", "fake-b"])
    assert len(usable) == 9
    (hole,) = set(range(10)) - set(usable.tolist())
    for name, teacher in cache.teachers.items():
        maps = np.asarray(group[f"teachers/{name}/spatial"][...])
        assert maps.shape == (1, 10, *teacher.spec.geometry.grid_hw, teacher.spec.spatial_dim)
        assert maps.dtype == np.dtype("<f2")
        np.testing.assert_array_equal(maps[0, usable], teacher.codes(usable))
        assert np.isnan(maps[0, hole]).all()
    summaries = np.asarray(group["teachers/fake-a/summary"][...])
    np.testing.assert_array_equal(summaries[0, usable], cache.teachers["fake-a"].summaries(usable))
    assert np.isnan(summaries[0, hole]).all()
    assert "summary" not in group["teachers/fake-b"]


def test_stored_maps_are_the_features_that_were_written(cache: Cache, photos: Path) -> None:
    row = 3
    image = Image.open(photos / cache.index.keys[row]).convert("RGB")
    for teacher in cache.teachers.values():
        summary, spatial = fake_features(image, teacher.spec)
        np.testing.assert_array_equal(teacher.maps([row])[0], spatial.astype(np.float16))
        if summary is not None:
            np.testing.assert_array_equal(teacher.summaries([row])[0], summary.astype(np.float16))


def test_zarr_python_reads_the_image_index(cache: Cache, photos: Path) -> None:
    group = zarr.open_group(cache.path, mode="r")
    index, images = group[cache.meta.index], group["images"]
    text, ends = np.asarray(index["key_bytes"][...]).tobytes(), np.asarray(index["key_ends"][...])
    keys = [text[a:b].decode() for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    assert keys == [f"{name}/{number}.png" for name in ("blue", "red") for number in range(5)]
    assert np.asarray(index["label"][...]).tolist() == [0] * 5 + [1] * 5
    assert np.asarray(index["offset"][...]).tolist() == np.asarray(index["length"][...]).tolist() == [-1] * 10
    status = np.asarray(images["status"][...])
    assert [keys[row] for row in np.flatnonzero(status == ImageStatus.UNUSABLE)] == ["red/1.png"]
    assert (status == ImageStatus.OK).sum() == 9
    assert np.asarray(images["size_hw"][...]).max(axis=1).tolist() == [48] * 6 + [0] + [48] * 3
    assert np.asarray(images["digest"][4, :]).tobytes() == digest((photos / keys[4]).read_bytes())


def test_our_attributes_leave_room_for_those_of_other_tools(cache: Cache) -> None:
    assert list(zarr.open_group(cache.path, mode="r").attrs) == ["radio_cache"]


def test_keys_in_any_script_survive(tmp_path: Path) -> None:
    empty_cache(tmp_path / "c.zarr")
    assert Cache(tmp_path / "c.zarr").index.keys[4] == "Grüße/4.png"


def test_keys_that_are_not_utf8_survive_and_can_be_printed(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", per_class=1)
    key = "blue/" + os.fsdecode(b"caf\xe9.png")
    (tmp_path / "photos/blue/0.png").rename(tmp_path / "photos" / key)
    cache = make_tiny_cache(tmp_path / "c.zarr", tmp_path / "photos", unusable=[key])
    assert cache.index.keys[0] == key
    assert cache.read_file(0) == (tmp_path / "photos" / key).read_bytes()
    with (tmp_path / "out").open("w", encoding="utf-8") as file:
        Console(file=file).print(describe_failures(cache))
    assert "blue/caf\N{REPLACEMENT CHARACTER}.png" in (tmp_path / "out").read_text()


# ---------------------------------------------------------------- creating


def test_an_empty_folder_becomes_a_cache_and_anything_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    empty_cache(tmp_path / "empty")
    assert Cache(tmp_path / "empty").num_images == 5
    for occupied in ("file", "folder/file"):
        (tmp_path / occupied).parent.mkdir(exist_ok=True)
        (tmp_path / occupied).write_text("mine")
        with pytest.raises(NotACacheError, match=r"exists and is not empty: choose another place, or remove it"):
            empty_cache(tmp_path / occupied.split("/")[0])
        assert (tmp_path / occupied).read_text() == "mine"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["empty", "file", "folder"]


def test_parent_folders_are_made(tmp_path: Path) -> None:
    empty_cache(tmp_path / "a/b/c.zarr")
    assert Cache(tmp_path / "a/b/c.zarr").num_images == 5


def test_adding_a_teacher_that_another_process_just_added_keeps_the_first(tmp_path: Path) -> None:
    meta = empty_cache(tmp_path / "c.zarr")
    add_teacher(tmp_path / "c.zarr", meta, fake_spec("t", summary_dim=None, spatial_dim=3))
    add_teacher(tmp_path / "c.zarr", meta, fake_spec("t", summary_dim=None, spatial_dim=4))
    assert Cache(tmp_path / "c.zarr").teachers["t"].spec.spatial_dim == 3
    assert [entry.name for entry in (tmp_path / "c.zarr/teachers").iterdir() if entry.is_dir()] == ["t"]


def test_a_teacher_in_the_making_is_not_a_teacher(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    meta = empty_cache(path)
    add_teacher(path, meta, fake_spec("t", summary_dim=None, spatial_dim=3))
    (path / "teachers/t").rename(path / f"teachers/t.tmp-{socket.gethostname()}-{os.getpid()}-01234567")
    assert not Cache(path).teachers


# ---------------------------------------------------------------- receipts


def test_a_receipt_names_every_file_with_its_size_and_checksum(cache: Cache) -> None:
    for unit, folder in (("images", "images"), ("fake-a", "teachers/fake-a"), ("fake-b", "teachers/fake-b")):
        for shard, receipt in enumerate(cache.receipts(unit)):
            assert receipt is not None
            assert (receipt.unit, receipt.shard, receipt.first_row) == (unit, shard, 4 * shard)
            assert receipt.num_rows == (4 if shard < 2 else 2)
            for file in receipt.files:
                data = (cache.path / folder / file.path).read_bytes()
                assert (len(data), crc32c(data[:-CRC_BYTES])) == (file.num_bytes, file.crc32c)


def test_the_checksums_of_a_receipt_tell_files_apart(cache: Cache) -> None:
    """A CRC over data and its own CRC is the same number for any data."""
    receipts = [receipt for receipt in cache.receipts("fake-a") if receipt]
    assert len({file.crc32c for receipt in receipts for file in receipt.files}) == sum(len(r.files) for r in receipts)


def test_writing_a_shard_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    spec = fake_spec("t", summary_dim=None, spatial_dim=3)
    add_teacher(path, empty_cache(path), spec)
    seen: list[dict[Path, bytes]] = []
    for _ in range(2):
        writer = ShardWriter(path, "t", 1)
        rows = [np.full((4, 4, 3), number, np.float16) for number in (1, 2)]
        writer.write_sharded("spatial", rows, grid=(0, 1, 0, 0, 0), chunks_per_shard=2)
        writer.commit({"first_row": 2, "num_rows": 2, "num_tokens": 32, "failures": ()})
        seen.append({file: file.read_bytes() for file in path.rglob("*") if file.is_file()})
    assert seen[0] == seen[1]


def test_plain_chunks_are_little_endian_on_any_machine(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    empty_cache(path)
    ShardWriter(path, "images", 0).write_plain("size_hw", np.array([[1, 2], [3, 4]], ">i4"), grid=(0, 0))
    assert Cache(path).sizes_hw[:2].tolist() == [[1, 2], [3, 4]]


# ---------------------------------------------------------------- specs


def test_a_spec_survives_json_and_tells_its_differences() -> None:
    spec = fake_spec("t", summary_dim=6, spatial_dim=8)
    stored = TeacherSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert stored == spec
    assert spec.differences(stored) == []
    larger = fake_spec("t", summary_dim=None, spatial_dim=8, size=40)
    assert spec.differences(larger) == [
        "geometry.grid_hw is (4, 4), this run asks for (5, 5)",
        "geometry.input_hw is (32, 32), this run asks for (40, 40)",
        "geometry.resize_px is 32, this run asks for 40",
        "summary_dim is 6, this run asks for None",
    ]
