"""Storage: the same contract on a disk and in a bucket, and which of them a place means."""

import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from radio_cache.errors import ConfigError, StorageError
from radio_cache.format.paths import checked_path
from radio_cache.storage import open_storage
from radio_cache.storage.base import Storage, absolute_path_or_url, is_url
from radio_cache.storage.local import LocalStorage


@pytest.fixture(params=["disk", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "disk":
        return LocalStorage(tmp_path / "c.zarr")
    return open_storage(request.getfixturevalue("bucket")("c.zarr"))


def contents(storage: Storage) -> dict[str, bytes]:
    return {path: storage.read(path) for path, _ in storage.list_files()}


# ---------------------------------------------------------------- the contract


def test_what_was_written_in_parts_is_read_as_one_file(storage: Storage) -> None:
    storage.write("a/b/c", [b"one", bytearray(b"two"), memoryview(b"three"), b""])
    assert storage.read("a/b/c") == b"onetwothree"
    assert storage.size("a/b/c") == 11
    storage.write("a/b/c", [b"new"])
    assert storage.read("a/b/c") == b"new"
    storage.write("empty", [])
    assert (storage.read("empty"), storage.size("empty")) == (b"", 0)


def test_many_parts_of_many_sizes_stay_in_order(storage: Storage) -> None:
    parts = [bytes([number % 251]) * (number % 7) for number in range(3000)]
    storage.write("many", parts)
    assert storage.read("many") == b"".join(parts)


def test_ranges_come_in_the_order_asked_and_end_with_the_file(storage: Storage) -> None:
    storage.write("f", [bytes(range(100))])
    found = storage.read_ranges("f", [(90, 5), (0, 3), (95, 50), (7, 0), (100, 3), (500, 1)])
    assert [bytes(part) for part in found] == [
        bytes(range(90, 95)),
        bytes(range(3)),
        bytes(range(95, 100)),
        b"",
        b"",
        b"",
    ]
    assert storage.read_ranges("f", []) == []


@pytest.mark.parametrize("length", [0, 1, 4, 99, 100, 101, 5000])
def test_the_tail_is_what_there_is_and_comes_with_the_size(storage: Storage, length: int) -> None:
    data = bytes(range(100))
    storage.write("f", [data])
    assert storage.read_tail("f", length) == (data[max(0, 100 - length) :], 100)
    storage.write("empty", [b""])
    assert storage.read_tail("empty", length) == (b"", 0)


def test_files_that_are_not_there_are_file_not_found(storage: Storage) -> None:
    for read in (
        storage.read,
        lambda path: storage.read_ranges(path, [(0, 1)]),
        lambda path: storage.read_tail(path, 4),
    ):
        with pytest.raises(FileNotFoundError):
            read("nowhere/file")
    assert storage.size("nowhere/file") is None
    assert not storage.exists("nowhere/file")
    assert list(storage.list_files("nowhere")) == []
    assert storage.list_folders("nowhere") == []
    storage.delete("nowhere/file")
    storage.delete_tree("nowhere")


def test_listing_is_sorted_and_recursive_and_folders_are_told_apart(storage: Storage) -> None:
    for path in ("z/9", "z/10", "a", "z/deep/er/1", "zz/1"):
        storage.write(path, [path.encode()])
    assert list(storage.list_files()) == [(path, len(path)) for path in ("a", "z/10", "z/9", "z/deep/er/1", "zz/1")]
    assert [path for path, _ in storage.list_files("z")] == ["z/10", "z/9", "z/deep/er/1"]
    assert storage.list_folders() == ["z", "zz"]
    assert storage.list_folders("z") == ["deep"]
    storage.delete_tree("z")
    storage.delete("a")
    assert list(contents(storage)) == ["zz/1"]


def test_create_if_absent_has_exactly_one_winner(storage: Storage) -> None:
    storage.write("warm", [b"up"])
    start, won = threading.Barrier(8), []

    def create(number: int) -> None:
        start.wait()
        if storage.create("only", bytes([number])):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read("only") == bytes(won)
    assert not storage.create("only", b"late")
    assert sorted(contents(storage)) == ["only", "warm"]


def test_of_two_trees_the_first_stays(storage: Storage) -> None:
    assert storage.write_tree("t", [("zarr.json", b"1"), ("a/b", b"2")], last="zarr.json")
    assert not storage.write_tree("t", [("zarr.json", b"3"), ("a/b", b"4")], last="zarr.json")
    assert contents(storage) == {"t/zarr.json": b"1", "t/a/b": b"2"}


def test_a_tree_whose_making_fails_is_not_there(storage: Storage) -> None:
    def files() -> Iterator[tuple[str, bytes]]:
        yield "a", b"1"
        raise ConfigError("no more")

    with pytest.raises(ConfigError):
        storage.write_tree("t", files(), last="zarr.json")
    assert not storage.exists("t/zarr.json")


@pytest.mark.parametrize(
    "path", ["../outside", "a/../../b", "/etc/passwd", "a\\..\\b", "a/\0b", "a\x1b[2J", "a\n", "\ud800"]
)
def test_paths_that_climb_out_are_refused(storage: Storage, path: str) -> None:
    for use in (
        storage.read,
        storage.size,
        storage.delete,
        storage.delete_tree,
        lambda p: storage.write(p, [b""]),
        lambda p: storage.create(p, b""),
        lambda p: list(storage.list_files(p)),
        lambda p: storage.read_tail(p, 1),
        lambda p: storage.read_ranges(p, [(0, 1)]),
        lambda p: storage.write_tree("t", [(p, b"")], last="zarr.json"),
    ):
        with pytest.raises(StorageError, match="is not a path inside a cache"):
            use(path)


def test_storage_survives_pickling(storage: Storage) -> None:
    storage.write("f", [b"1"])
    copied = pickle.loads(pickle.dumps(storage))
    assert (copied.url, copied.read("f")) == (storage.url, b"1")


# ---------------------------------------------------------------- places


def test_places_are_paths_or_urls(tmp_path: Path) -> None:
    assert is_url("s3://bucket/x")
    assert not is_url("C:/x")
    assert not is_url(tmp_path)
    assert open_storage(f"file://{tmp_path}/x").local_path() == tmp_path / "x"
    assert open_storage("some/path").url == "some/path"
    storage = LocalStorage(tmp_path)
    assert open_storage(storage) is storage
    assert open_storage("s3://bucket/a/").url == "s3://bucket/a"
    assert absolute_path_or_url("s3://bucket/x") == "s3://bucket/x"
    assert absolute_path_or_url("x") == str(Path.cwd() / "x")
    with pytest.raises(ConfigError, match=r"ftp://x/y: a cache lies in a folder, or at a URL with one of s3, "):
        open_storage("ftp://x/y")
    with pytest.raises(StorageError, match="s3://bucket/a/b is not on a local disk"):
        open_storage("s3://bucket/a").local_path("b")
    assert checked_path("a..b/c") == "a..b/c"
