"""Reading: right rows, right errors, every flipped byte noticed, in any thread and in any process."""

import json
import os
import pickle
import shutil
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from radio_cache import Cache
from radio_cache.checks.verify import verify_cache
from radio_cache.errors import (
    CorruptShardError,
    ImageError,
    MissingRowsError,
    NotACacheError,
    ShapeError,
    StoreError,
    UnsupportedFormatError,
)
from radio_cache.format.checksums import CRC_BYTES
from radio_cache.format.schema import receipt_path
from radio_cache.reader import is_cache
from radio_cache.shards import index_cache as known_shards
from radio_cache.shards.batch import Verify
from radio_cache.shards.encoding import index_bytes
from radio_cache.testing import make_tiny_cache, write_images

USABLE = [0, 1, 2, 3, 4, 5, 7, 8, 9]
UNUSABLE_ROW = 6


def edit_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(file.read_text())
    change(data)
    data.get("attributes", {}).get("radio_cache", {}).pop("crc32c", None)  # as if it had been written so
    file.write_text(json.dumps(data))


# ---------------------------------------------------------------- opening


def test_opening_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotACacheError, match=r"nowhere\.zarr does not exist"):
        Cache(tmp_path / "nowhere.zarr")
    assert not is_cache(tmp_path / "nowhere.zarr")


def test_opening_a_file_says_what_a_cache_is(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(NotACacheError, match=r"photo\.jpg is a file, not a radio-cache store, which is a folder"):
        Cache(tmp_path / "photo.jpg")


def test_opening_an_empty_folder_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(NotACacheError, match=r"is a folder, but not a radio-cache store: it has no zarr\.json"):
        Cache(tmp_path)


def test_opening_a_foreign_zarr_group_says_it_is_one(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "theirs.zarr", attributes={"title": "temperatures"})
    with pytest.raises(NotACacheError, match=r"theirs\.zarr is a Zarr group, but not a radio-cache store"):
        Cache(tmp_path / "theirs.zarr")


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '{"attributes": 3}', '{"attributes": {"radio_cache": 3}}'])
def test_opening_broken_json_is_not_a_traceback(tmp_path: Path, content: str) -> None:
    (tmp_path / "zarr.json").write_text(content)
    with pytest.raises((NotACacheError, CorruptShardError), match=str(tmp_path)):
        Cache(tmp_path)


def test_opening_a_part_of_a_cache_says_that_it_is_not_a_whole_one(cache_path: Path) -> None:
    for part in ("images", "teachers", "teachers/fake-a", "teachers/fake-a/spatial"):
        with pytest.raises(NotACacheError):
            Cache(cache_path / part)


def test_a_newer_format_version_is_refused_with_the_cure(cache_path: Path) -> None:
    edit_json(cache_path / "zarr.json", lambda data: data["attributes"]["radio_cache"].update(format_version=2))
    with pytest.raises(UnsupportedFormatError, match=r"format version 2, this radio-cache reads version 1: install"):
        Cache(cache_path)
    assert is_cache(cache_path)


def test_a_codec_of_the_future_is_refused_with_the_cure(cache_path: Path) -> None:
    edit_json(
        cache_path / "teachers/fake-a/zarr.json",
        lambda data: data["attributes"]["radio_cache"].update(codec={"name": "klt9"}),
    )
    cache = Cache(cache_path)
    assert list(cache.teachers) == ["fake-b"]  # the others are as good as ever
    with pytest.raises(UnsupportedFormatError, match=r"fake-a/zarr\.json: codec 'klt9' is unknown"):
        cache.teachers["fake-a"]


# ---------------------------------------------------------------- rows


def test_usable_rows_leave_out_the_unusable_image(cache: Cache) -> None:
    assert cache.usable_rows(cache.teachers).tolist() == USABLE
    (failure,) = cache.failures()
    assert (failure.row, failure.reason) == (UNUSABLE_ROW, "marked unusable")
    assert cache.index.keys[failure.row] == "red/1.png"


def test_rows_without_a_receipt_are_not_usable(cache_path: Path) -> None:
    (cache_path / receipt_path("fake-b", 0)).unlink()
    assert Cache(cache_path).usable_rows(["fake-b"]).tolist() == [4, 5, 7, 8, 9]
    assert Cache(cache_path).usable_rows(["fake-a", "fake-b"]).tolist() == [4, 5, 7, 8, 9]
    assert Cache(cache_path).usable_rows(["fake-a"]).tolist() == USABLE
    (cache_path / receipt_path("images", 2)).unlink()
    assert Cache(cache_path).usable_rows(["fake-a"]).tolist() == [0, 1, 2, 3, 4, 5, 7]


def test_any_order_any_type_and_repeats_of_rows(cache: Cache) -> None:
    teacher = cache.teachers["fake-a"]
    everything = teacher.maps(USABLE)
    asked = [9, 0, 4, 4, 1]
    expected = everything[[USABLE.index(row) for row in asked]]
    np.testing.assert_array_equal(teacher.maps(asked), expected)
    np.testing.assert_array_equal(teacher.maps(np.array(asked)), expected)
    np.testing.assert_array_equal(teacher.maps(range(1, 4)), everything[1:4])
    assert teacher.maps([]).shape == (0, 4, 4, 8)
    np.testing.assert_array_equal(teacher.summaries(asked), teacher.summaries(USABLE)[[8, 0, 4, 4, 1]])


@pytest.mark.parametrize("row", [UNUSABLE_ROW, 10, 11, 400, -1])
def test_rows_that_are_not_there_are_named(cache: Cache, row: int) -> None:
    for read in (cache.teachers["fake-a"].codes, cache.teachers["fake-a"].summaries):
        with pytest.raises(MissingRowsError, match=f"teacher 'fake-a' has nothing for row {row}: .*usable_rows"):
            read([0, row])


def test_a_row_of_a_shard_that_is_not_built_is_missing(cache_path: Path, shard_file: Path) -> None:
    shard_file.unlink()
    (cache_path / receipt_path("fake-a", 1)).unlink()
    with pytest.raises(MissingRowsError, match=r"nothing for row 5: .*run the build again"):
        Cache(cache_path).teachers["fake-a"].codes([5])


def test_a_teacher_without_summary_says_so(cache: Cache) -> None:
    with pytest.raises(StoreError, match="teacher 'fake-b' has no summary, only maps"):
        cache.teachers["fake-b"].summaries([0])


def test_codes_fill_a_buffer_of_the_caller(cache: Cache) -> None:
    teacher = cache.teachers["fake-a"]
    buffer = np.zeros((2, 4, 4, 8), np.float16)
    assert teacher.codes([3, 1], out=buffer) is buffer
    np.testing.assert_array_equal(buffer, teacher.codes([3, 1]))


@pytest.mark.parametrize(
    "buffer",
    [
        np.zeros((3, 4, 4, 8), np.float16),
        np.zeros((2, 4, 4, 8), np.float32),
        np.zeros((2, 4, 8, 4), np.float16).swapaxes(2, 3),
    ],
    ids=["rows", "type", "order"],
)
def test_a_buffer_that_does_not_fit_is_refused_with_both_shapes(cache: Cache, buffer: np.ndarray) -> None:
    with pytest.raises(ShapeError, match=r"the buffer is .*needed is C-contiguous float16 \(2, 4, 4, 8\)"):
        cache.teachers["fake-a"].codes([0, 1], out=buffer)


@pytest.mark.parametrize("verify", ["always", "first", "never"])
@pytest.mark.parametrize("threads", [1, 2, 9])
def test_threads_and_verification_change_no_byte(cache: Cache, threads: int, verify: Verify) -> None:
    teacher = cache.teachers["fake-a"]
    rows = [9, 0, 4, 4, 1, 8]
    np.testing.assert_array_equal(
        teacher.codes(rows, threads=threads, verify=verify), np.stack([teacher.codes([row])[0] for row in rows])
    )


def test_a_view_that_is_not_there_is_refused(cache: Cache) -> None:
    for view in (-1, 1):
        with pytest.raises(ShapeError, match=f"'fake-a' has 1 views, and view {view} was asked for"):
            cache.teachers["fake-a"].codes([0], view=view)


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", [1, 10, 4, 4, 1 << 40]),
        ("data_type", "float32"),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [1, 2, 4, 4, 8]}}),
        ("fill_value", 0),
        ("codecs", [{"name": "bytes", "configuration": {"endian": "little"}}]),
    ],
)
def test_metadata_of_another_array_are_refused_before_anything_is_read(
    cache_path: Path, field: str, value: object
) -> None:
    document = cache_path / "teachers/fake-a/spatial/zarr.json"
    edit_json(document, lambda data: data.update({field: value}))
    with pytest.raises(
        CorruptShardError, match=f"{document} says {field} is .*, the cache's spec says .*edited.*repair"
    ):
        Cache(cache_path).teachers["fake-a"].codes([0])


def test_maps_may_be_longer_than_the_cache_says_while_it_grows(cache_path: Path, cache: Cache) -> None:
    document = cache_path / "teachers/fake-a/spatial/zarr.json"
    edit_json(document, lambda data: data["shape"].__setitem__(1, 1000))
    np.testing.assert_array_equal(
        Cache(cache_path).teachers["fake-a"].codes([0, 9]), cache.teachers["fake-a"].codes([0, 9])
    )


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[" * 100_000, b"7"])
def test_metadata_that_are_no_document_are_refused(cache_path: Path, content: bytes) -> None:
    document = cache_path / "teachers/fake-a/spatial/zarr.json"
    document.write_bytes(content)
    with pytest.raises(CorruptShardError, match=f"{document} does not describe a Zarr array.*repair"):
        Cache(cache_path).teachers["fake-a"].codes([0])
    document.unlink()
    with pytest.raises(CorruptShardError, match=f"{document} is gone: radio-cache repair"):
        Cache(cache_path).teachers["fake-a"].codes([0])


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def test_a_flipped_byte_of_a_map_names_the_file_the_row_and_the_cure(cache_path: Path, shard_file: Path) -> None:
    before = Cache(cache_path).teachers["fake-a"].codes([4, 5])
    flip(shard_file, 10)
    teacher = Cache(cache_path).teachers["fake-a"]
    with pytest.raises(
        CorruptShardError, match=f"{shard_file}: row 4 does not match its checksum: .*repair.* makes it again"
    ):
        teacher.codes([4])
    np.testing.assert_array_equal(teacher.codes([5]), before[1:])
    assert not np.array_equal(teacher.codes([4], verify="never"), before[:1])


@pytest.mark.parametrize("back_from_end", [1, CRC_BYTES + 1, index_bytes(4)])
def test_a_flipped_byte_of_the_index_names_the_file(cache_path: Path, shard_file: Path, back_from_end: int) -> None:
    flip(shard_file, shard_file.stat().st_size - back_from_end)
    with pytest.raises(CorruptShardError, match=f"{shard_file}: the index .* does not match its checksum"):
        Cache(cache_path).teachers["fake-a"].codes([5])


@pytest.mark.parametrize("kept_bytes", [0, 1, index_bytes(4) - 1, index_bytes(4), 700])
def test_a_shard_cut_short_names_the_file(cache_path: Path, shard_file: Path, kept_bytes: int) -> None:
    os.truncate(shard_file, kept_bytes)
    with pytest.raises(CorruptShardError, match=str(shard_file)):
        Cache(cache_path).teachers["fake-a"].codes([5])


def test_a_shard_without_its_beginning_is_noticed(cache_path: Path, shard_file: Path) -> None:
    """The index is whole, and points behind the end."""
    shard_file.write_bytes(shard_file.read_bytes()[-index_bytes(4) - 8 :])
    with pytest.raises(CorruptShardError, match=f"{shard_file}: row 5"):
        Cache(cache_path).teachers["fake-a"].codes([5])


@pytest.mark.parametrize("other", ["teachers/fake-c", "teachers/fake-a/0"])
def test_a_shard_of_another_teacher_or_of_other_rows_is_not_taken_for_this_one(
    tmp_path: Path, photos: Path, other: str
) -> None:
    """Of the same shape, so that nothing but its label tells it apart."""
    path = tmp_path / "c.zarr"
    make_tiny_cache(path, photos, teachers={"fake-a": (None, 8), "fake-c": (None, 8)})
    shard = path / "teachers/fake-a/spatial/c/0/1/0/0/0"
    source = path / (other if other.endswith("c") else "teachers/fake-a") / f"spatial/c/0/{int('0' not in other)}/0/0/0"
    shutil.copy(source, shard)
    with pytest.raises(
        CorruptShardError, match=rf"{shard} is another shard's file: `radio-cache repair` drops its shard"
    ):
        Cache(path).teachers["fake-a"].codes([5])
    assert [damage.shard for damage in verify_cache(Cache(path)).damages] == [1]


@pytest.mark.parametrize("file", ["summary/c/0/{}/0", "stats/spatial/c/{}/0/0", "stats/summary/c/{}/0/0"])
def test_files_of_other_rows_are_not_taken_for_those_a_receipt_names(cache_path: Path, file: str) -> None:
    folder = cache_path / "teachers/fake-a"
    shutil.copy(folder / file.format(0), folder / file.format(1))
    teacher = Cache(cache_path).teachers["fake-a"]
    read = {"sum": lambda: teacher.summaries([0]), "spa": teacher.spatial_mean_std, "mea": teacher.summary_mean_std}
    name = "sum" if file.startswith("summary") else "spa" if "spatial" in file else "mea"
    with pytest.raises(CorruptShardError, match=rf"{folder / file.format(1)} \(shard 1\).*radio-cache repair"):
        read[name]()


def test_a_deleted_shard_that_a_receipt_vouches_for_names_the_file_and_the_receipt(
    cache_path: Path, shard_file: Path
) -> None:
    shard_file.unlink()
    with pytest.raises(CorruptShardError, match=f"{shard_file}.*receipt.*radio-cache repair .*build again"):
        Cache(cache_path).teachers["fake-a"].codes([5])


def open_files(folder: Path) -> int:
    """How many descriptors of this process lead below a folder."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc here to count descriptors in")
    links = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return sum(link.startswith(f"{folder}/") for link in links)


def test_damage_leaks_no_descriptor(cache_path: Path, shard_file: Path) -> None:
    flip(shard_file, shard_file.stat().st_size - 1)
    teacher = Cache(cache_path).teachers["fake-a"]
    with pytest.raises(CorruptShardError):
        teacher.codes([5])
    assert open_files(cache_path) == 0


@pytest.mark.parametrize(
    "damage",
    [lambda file: flip(file, 3), lambda file: os.truncate(file, 5), lambda file: os.truncate(file, 0)],
    ids=["flip", "cut", "empty"],
)
@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("teachers/fake-a/summary/c/0/1/0", lambda cache: cache.teachers["fake-a"].summaries([0])),
        ("teachers/fake-a/stats/spatial/c/1/0/0", lambda cache: cache.teachers["fake-a"].spatial_mean_std()),
        ("teachers/fake-a/stats/summary/c/1/0/0", lambda cache: cache.teachers["fake-a"].summary_mean_std()),
        ("images/size_hw/c/1/0", lambda cache: cache.sizes_hw),
        ("images/digest/c/1/0", lambda cache: cache.digests),
    ],
    ids=lambda value: value.split("/c/")[0] if isinstance(value, str) else "",
)
def test_damage_to_any_other_array_names_the_array(
    cache_path: Path, file: str, read: Callable[[Cache], object], damage: Callable[[Path], None]
) -> None:
    damage(cache_path / file)
    with pytest.raises(CorruptShardError, match=str(cache_path / file.split("/c/")[0])):
        read(Cache(cache_path))


def test_a_deleted_summary_that_a_receipt_vouches_for_is_not_called_unbuilt(cache_path: Path) -> None:
    (cache_path / "teachers/fake-a/summary/c/0/1/0").unlink()
    with pytest.raises(CorruptShardError, match=r"teachers/fake-a/summary/c/0/1/0 .*receipt.*repair"):
        Cache(cache_path).teachers["fake-a"].summaries([5])


def test_deleted_statistics_do_not_become_nan(cache_path: Path) -> None:
    (cache_path / "teachers/fake-a/stats/spatial/c/1/0/0").unlink()
    with pytest.raises(CorruptShardError, match=r"fake-a/stats/spatial/c/1/0/0 .*receipt.*repair"):
        Cache(cache_path).teachers["fake-a"].spatial_mean_std()


def test_a_deleted_status_does_not_silently_shrink_the_cache(cache_path: Path) -> None:
    """Receipts say which images are usable; `images/status` says the same to other tools."""
    before = Cache(cache_path).usable_rows()
    (cache_path / "images/status/c/1").unlink()
    np.testing.assert_array_equal(Cache(cache_path).usable_rows(), before)


def test_deleted_sizes_do_not_become_zeros(cache_path: Path) -> None:
    (cache_path / "images/size_hw/c/1/0").unlink()
    with pytest.raises(CorruptShardError, match=r"images/size_hw/c/1/0 .*receipt.*repair"):
        Cache(cache_path).sizes_hw  # noqa: B018


def test_attributes_edited_by_hand_are_noticed(cache_path: Path) -> None:
    for document in (cache_path / "zarr.json", cache_path / "teachers/fake-a/zarr.json"):
        good = document.read_text()
        document.write_text(
            good.replace('"shard_images": 4', '"shard_images": 5').replace('"family": "fake"', '"family": "real"')
        )
        with pytest.raises(CorruptShardError, match=f"{document}: .* does not match its own checksum"):
            Cache(cache_path).teachers["fake-a"]
        document.write_text(good)
    Cache(cache_path)


def test_a_receipt_without_its_fields_is_a_store_error(cache_path: Path) -> None:
    edit_json(cache_path / receipt_path("fake-a", 0), lambda data: data.pop("files"))
    with pytest.raises(StoreError, match=r"000000\.json is damaged \(a receipt does not"):
        Cache(cache_path).usable_rows(["fake-a"])


# ---------------------------------------------------------------- statistics


def test_statistics_are_those_of_the_stored_maps_and_summaries(cache: Cache) -> None:
    teacher = cache.teachers["fake-a"]
    tokens = teacher.maps(USABLE).reshape(-1, 8).astype(np.float64)
    mean, std = teacher.spatial_mean_std()
    np.testing.assert_allclose(mean, tokens.mean(axis=0), atol=1e-3)
    np.testing.assert_allclose(std, tokens.std(axis=0), atol=1e-3)
    mean, std = teacher.summary_mean_std()
    np.testing.assert_allclose(mean, teacher.summaries(USABLE).mean(axis=0), atol=1e-3)
    np.testing.assert_allclose(std, teacher.summaries(USABLE).std(axis=0), atol=1e-3)


def test_statistics_count_finished_shards_only(cache_path: Path) -> None:
    (cache_path / receipt_path("fake-a", 1)).unlink()
    teacher = Cache(cache_path).teachers["fake-a"]
    mean, _ = teacher.spatial_mean_std()
    np.testing.assert_allclose(mean, teacher.maps([0, 1, 2, 3, 8, 9]).mean(axis=(0, 1, 2)), atol=1e-3)


def test_statistics_of_a_teacher_that_has_not_started_are_missing(cache_path: Path) -> None:
    shutil.rmtree(cache_path / "receipts/fake-a")
    with pytest.raises(MissingRowsError, match="teacher 'fake-a' has no finished shard yet: run the build"):
        Cache(cache_path).teachers["fake-a"].spatial_mean_std()


def test_stored_bytes_are_those_on_disk(cache: Cache) -> None:
    folder = cache.path / "teachers/fake-a"
    assert cache.teachers["fake-a"].stored_bytes() == sum(
        file.stat().st_size for file in folder.rglob("c/**/*") if file.is_file()
    )


# ---------------------------------------------------------------- pixels


def test_image_files_are_read_from_where_the_build_found_them(cache: Cache, photos: Path) -> None:
    for row in (0, 9):
        assert cache.read_file(row) == (photos / cache.index.keys[row]).read_bytes()


def test_changed_and_missing_image_files_are_image_errors(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", per_class=1)
    cache = make_tiny_cache(tmp_path / "c.zarr", tmp_path / "photos")
    (tmp_path / "photos/blue/0.png").write_bytes(b"another picture")
    with pytest.raises(ImageError, match=r"blue/0\.png has changed since the cache was built: build the cache again"):
        cache.read_file(0)
    (tmp_path / "photos/red/0.png").unlink()
    with pytest.raises(ImageError, match="cannot be read: No such file or directory"):
        cache.read_file(1)


# ---------------------------------------------------------------- threads and processes


def test_many_threads_read_the_same_as_one(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_shards, "MAX_OPEN_FILES", 1)  # every read of another shard closes the last one
    teacher = cache.teachers["fake-a"]
    expected = teacher.codes(USABLE)
    rows = np.random.default_rng(0).integers(0, len(USABLE), 400)
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda number: teacher.codes([USABLE[number]])[0], rows))
    np.testing.assert_array_equal(np.stack(read), expected[rows])


def test_descriptors_stay_bounded_and_are_closed(cache_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_shards, "MAX_OPEN_FILES", 2)
    cache = Cache(cache_path)
    cache.teachers["fake-a"].codes(USABLE)
    assert open_files(cache_path) == 2
    cache.teachers.clear()
    assert open_files(cache_path) == 0


def test_a_pickled_cache_reads_the_same(cache: Cache) -> None:
    cache.teachers["fake-a"].codes([0])
    copy = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(copy.teachers["fake-a"].codes(USABLE), cache.teachers["fake-a"].codes(USABLE))
    teacher = pickle.loads(pickle.dumps(cache.teachers["fake-b"]))
    np.testing.assert_array_equal(teacher.codes(USABLE), cache.teachers["fake-b"].codes(USABLE))


class MapsOfRows(torch.utils.data.Dataset[np.ndarray]):
    """What a training script of somebody else's may do."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(USABLE)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.cache.teachers["fake-a"].codes([USABLE[number]], threads=2)[0]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader_read_the_same(cache: Cache, start: str) -> None:
    expected = cache.teachers["fake-a"].codes(
        USABLE, threads=2
    )  # descriptors, indexes and threads are there when it forks
    loader = torch.utils.data.DataLoader(
        MapsOfRows(cache), batch_size=4, num_workers=2 if start == "fork" else 1, multiprocessing_context=start
    )
    np.testing.assert_array_equal(torch.cat(list(loader)).numpy(), expected)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the mixture of threads and fork is the point
def test_a_fork_while_other_threads_read_leaves_a_cache_that_works(cache: Cache) -> None:
    teacher = cache.teachers["fake-a"]
    expected = teacher.codes(USABLE).tobytes()
    stop = threading.Event()

    def keep_reading() -> None:
        while not stop.is_set():
            teacher.codes(USABLE)

    readers = [threading.Thread(target=keep_reading) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(8):
            child = os.fork()
            if child == 0:
                signal.alarm(20)  # a lock that a thread of the parent held would be held here for ever
                fresh = Cache(cache.path).teachers["fake-a"].summaries(USABLE)  # through zarr-python
                os._exit(0 if teacher.codes(USABLE).tobytes() == expected and fresh.any() else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert teacher.codes(USABLE).tobytes() == expected
