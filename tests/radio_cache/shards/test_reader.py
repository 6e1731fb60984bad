"""Rows of a sharded array: the right bytes in any order, thread and process; every damage named; no number believed."""

import errno
import gc
import multiprocessing
import os
import pickle
import signal
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from radio_cache.errors import CorruptShardError, StorageError
from radio_cache.format.checksums import CRC_BYTES, crc32c, with_crc
from radio_cache.shards import batch as shard_batches
from radio_cache.shards import index_cache as known_shards
from radio_cache.shards import native as native_batch
from radio_cache.shards.batch import Verify
from radio_cache.shards.encoding import encode_shard, index_bytes
from radio_cache.shards.index_cache import ShardLayout
from radio_cache.shards.reader import ShardReader
from radio_cache.storage.local import LocalStorage

SHARD_IMAGES, NUM_ROWS, HOLES = 4, 14, (5, 9)
LARGE = (256 << 10) + 1001  # more than one piece


@pytest.fixture(params=["compiled", "python"], autouse=True)
def way_of_reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test with the compiled code, where it could be built, and without it."""
    if request.param == "compiled" and not native_batch.AVAILABLE:
        pytest.skip("radio_cache.native._rows was not built: no compiler, or not an x86-64 processor")
    monkeypatch.setattr(native_batch, "AVAILABLE", request.param == "compiled")
    return request.param


@pytest.fixture
def python_reads(way_of_reading: str) -> None:
    """For tests of system calls, which they replace."""
    if way_of_reading == "compiled":
        pytest.skip("about the system calls of the Python code")


class Bucket:
    """A folder that is read as an object store is: by ranges and tails, no descriptors."""

    is_local = False

    def __init__(self, folder: Path) -> None:
        self._files = LocalStorage(folder)
        self.requests: list[tuple[str, int]] = []
        self.at = self._files.at

    def read_ranges(self, path: str, ranges: list[tuple[int, int]]) -> list[bytes | memoryview]:
        self.requests.append((path, len(ranges)))
        return self._files.read_ranges(path, ranges)

    def read_tail(self, path: str, length: int) -> tuple[bytes, int]:
        self.requests.append((path, 0))
        return self._files.read_tail(path, length)


STORAGES = {"disk": LocalStorage, "bucket": Bucket}


def layout(row_bytes: int, *, zstd: bool) -> ShardLayout:
    return ShardLayout(row_axes=2, row_bytes=row_bytes, shard_images=SHARD_IMAGES, zstd=zstd)


def rows_of(row_bytes: int) -> np.ndarray:
    """(NUM_ROWS, row_bytes); compressible, so that zstd has something to do."""
    return np.random.default_rng(0).integers(0, 9, (NUM_ROWS, row_bytes), dtype=np.uint8)


def write(folder: Path, rows: np.ndarray, *, zstd: bool, view: int = 0) -> None:
    shape = layout(rows.shape[1], zstd=zstd)
    for shard in range(-(-len(rows) // SHARD_IMAGES)):
        numbers = range(shard * SHARD_IMAGES, min((shard + 1) * SHARD_IMAGES, len(rows)))
        chunks = [None if number in HOLES else rows[number].tobytes() for number in numbers]
        if zstd:
            chunks = [chunk and zstandard.ZstdCompressor(level=1).compress(chunk) for chunk in chunks]
        file = folder / "array" / shape.key(view, shard)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_shard(chunks, SHARD_IMAGES))


def read(
    reader: ShardReader, rows: list[int], row_bytes: int, *, verify: Verify = "always", threads: int = 1, view: int = 0
) -> tuple[np.ndarray, list[int]]:
    out = np.full((len(rows), row_bytes), 255, np.uint8)
    missing = reader.read(view, np.array(rows, np.int64), out, verify=verify, threads=threads)
    return out, missing.tolist()


@pytest.fixture(params=STORAGES)
def storage_kind(request: pytest.FixtureRequest) -> str:
    return request.param


def reader_of(folder: Path, row_bytes: int, *, zstd: bool = False, kind: str = "disk") -> ShardReader:
    return ShardReader(STORAGES[kind](folder), "array", layout(row_bytes, zstd=zstd))


# ---------------------------------------------------------------- the right bytes


@pytest.mark.parametrize("zstd", [False, True], ids=["plain", "zstd"])
@pytest.mark.parametrize("row_bytes", [1, 100, LARGE])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("verify", ["always", "first", "never"])
def test_every_row_comes_as_it_was_written(
    tmp_path: Path, storage_kind: str, row_bytes: int, threads: int, verify: Verify, zstd: bool
) -> None:
    rows = rows_of(row_bytes)
    write(tmp_path, rows, zstd=zstd)
    reader = reader_of(tmp_path, row_bytes, zstd=zstd, kind=storage_kind)
    for wanted in ([3, 0, 13, 2, 1, 8, 8], [number for number in range(NUM_ROWS) if number not in HOLES], [7], []):
        out, missing = read(reader, wanted, row_bytes, verify=verify, threads=threads)
        np.testing.assert_array_equal(out, rows[wanted])
        assert missing == []


@settings(max_examples=60, deadline=None)
@given(wanted=st.lists(st.integers(0, NUM_ROWS - 1), max_size=40), threads=st.integers(1, 4), piece=st.integers(1, 400))
def test_any_batch_in_any_order_comes_right_and_holes_are_listed(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[int], threads: int, piece: int
) -> None:
    folder, rows = tmp_path_factory.mktemp("store"), rows_of(50)
    write(folder, rows, zstd=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_batches, "PIECE", piece)  # pieces of rows, single rows, and many rows at once
        out, missing = read(reader_of(folder, 50), wanted, 50, threads=threads)
    assert missing == [position for position, row in enumerate(wanted) if row in HOLES]
    expected = rows[wanted]
    expected[missing] = 255
    np.testing.assert_array_equal(out, expected)


def test_views_are_read_from_their_own_files(tmp_path: Path, storage_kind: str) -> None:
    first, second = rows_of(60), rows_of(60)[::-1].copy()
    write(tmp_path, first, zstd=False, view=0)
    write(tmp_path, second, zstd=False, view=1)
    reader = reader_of(tmp_path, 60, kind=storage_kind)
    for view, rows in ((0, first), (1, second), (0, first)):
        np.testing.assert_array_equal(read(reader, [1, 12], 60, view=view)[0], rows[[1, 12]])


def test_rows_of_a_shard_that_is_not_there_are_missing(tmp_path: Path, storage_kind: str) -> None:
    write(tmp_path, rows_of(20), zstd=False)
    (tmp_path / "array" / layout(20, zstd=False).key(0, 1)).unlink()
    reader = reader_of(tmp_path, 20, kind=storage_kind)
    assert read(reader, [12, 7, 0, 4], 20, threads=2)[1] == [1, 3]


def test_an_index_is_read_once_and_rows_of_one_shard_in_one_request(tmp_path: Path) -> None:
    write(tmp_path, rows_of(20), zstd=False)
    bucket = Bucket(tmp_path)
    reader = ShardReader(bucket, "array", layout(20, zstd=False))  # pyright: ignore[reportArgumentType]
    read(reader, [3, 1, 2, 8], 20)
    read(reader, [0, 1, 10], 20)
    first, third = (f"array/{layout(20, zstd=False).key(0, shard)}" for shard in (0, 2))
    assert sorted(bucket.requests) == sorted([(first, 0), (first, 3), (third, 0), (third, 1), (first, 2), (third, 1)])


@pytest.mark.usefixtures("python_reads")
def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As network file systems may return them."""
    rows, preadv = rows_of(100), os.preadv

    def short(descriptor: int, buffers: list[memoryview], offset: int, _flags: int = 0) -> int:
        return preadv(descriptor, [memoryview(buffers[0])[:7]], offset)

    write(tmp_path, rows, zstd=False)
    monkeypatch.setattr(os, "preadv", short)
    np.testing.assert_array_equal(read(reader_of(tmp_path, 100), [1, 2, 3, 11], 100)[0], rows[[1, 2, 3, 11]])


@pytest.mark.usefixtures("python_reads")
@pytest.mark.parametrize("answer", [errno.EAGAIN, errno.EOPNOTSUPP, "a part"])
def test_rows_that_are_not_in_memory_are_waited_for(
    answer: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several threads, small rows are first asked for without waiting; a file system may refuse that."""
    rows, preadv, asked = rows_of(100), os.preadv, list[int]()

    def some(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        asked.append(flags)
        if not flags or offset % 3 == 0:
            return preadv(descriptor, buffers, offset)
        if isinstance(answer, int):
            raise OSError(answer, os.strerror(answer))
        return preadv(descriptor, [memoryview(buffers[0])[:7]], offset)

    write(tmp_path, rows, zstd=False)
    monkeypatch.setattr(os, "preadv", some)
    wanted = [11, 1, 2, 3, 3]
    np.testing.assert_array_equal(read(reader_of(tmp_path, 100), wanted, 100, threads=2)[0], rows[wanted])
    assert 0 in asked
    assert asked.count(getattr(os, "RWF_NOWAIT", 0)) > 0


# ---------------------------------------------------------------- damage


def shard_file(folder: Path, shard: int = 0) -> Path:
    return folder / "array" / layout(1, zstd=False).key(0, shard)


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("zstd", [False, True], ids=["plain", "zstd"])
@pytest.mark.parametrize("row_bytes", [100, LARGE])
def test_a_flipped_byte_names_the_file_the_row_and_the_cure(
    tmp_path: Path, storage_kind: str, row_bytes: int, zstd: bool
) -> None:
    write(tmp_path, rows_of(row_bytes), zstd=zstd)
    first, length = struct.unpack_from(
        "<QQ", shard_file(tmp_path).read_bytes(), shard_file(tmp_path).stat().st_size - index_bytes(4) + 16
    )
    for position in (first, first + length - CRC_BYTES - 1, first + length - 1):  # its ends, and its checksum
        flip(shard_file(tmp_path), position)
        reader = reader_of(tmp_path, row_bytes, zstd=zstd, kind=storage_kind)
        for verify in ("always", "first"):
            with pytest.raises(
                CorruptShardError,
                match=f"{shard_file(tmp_path)}: row 1 does not match its checksum: .*repair.* build makes it again",
            ):
                read(reader, [2, 1, 0], row_bytes, threads=2, verify=verify)
        np.testing.assert_array_equal(read(reader, [0], row_bytes)[0], rows_of(row_bytes)[:1])
        flip(shard_file(tmp_path), position)


def test_first_checks_each_chunk_once_and_never_checks_none(tmp_path: Path) -> None:
    write(tmp_path, rows_of(100), zstd=False)
    reader = reader_of(tmp_path, 100)
    read(reader, [0], 100, verify="first")
    with shard_file(tmp_path).open("r+b") as file:  # the same file, damaged in place: rows 0 and 1
        file.write(b"\xff")
        file.seek(104)
        file.write(b"\xff")
    assert read(reader, [0], 100, verify="first")[0][0, 0] == 255
    assert read(reader, [1], 100, verify="never")[0][0, 0] == 255
    for row, verify in ((1, "first"), (0, "always")):
        with pytest.raises(CorruptShardError, match=f"row {row} does not match"):
            read(reader, [row], 100, verify=verify)


@pytest.mark.parametrize("back_from_end", [1, CRC_BYTES + 1, index_bytes(4)])
def test_a_flipped_byte_of_the_index_names_the_file(tmp_path: Path, storage_kind: str, back_from_end: int) -> None:
    write(tmp_path, rows_of(100), zstd=False)
    flip(shard_file(tmp_path), shard_file(tmp_path).stat().st_size - back_from_end)
    with pytest.raises(CorruptShardError, match=f"{shard_file(tmp_path)}: the index .* does not match its checksum"):
        read(reader_of(tmp_path, 100, kind=storage_kind), [0], 100)


@pytest.mark.parametrize("kept_bytes", [0, 1, index_bytes(4) - 1, index_bytes(4), 300])
def test_a_shard_cut_short_names_the_file(tmp_path: Path, storage_kind: str, kept_bytes: int) -> None:
    write(tmp_path, rows_of(100), zstd=False)
    os.truncate(shard_file(tmp_path), kept_bytes)
    with pytest.raises(CorruptShardError, match=str(shard_file(tmp_path))):
        read(reader_of(tmp_path, 100, kind=storage_kind), [0], 100)


def test_a_shard_cut_short_after_it_was_opened_names_the_row(tmp_path: Path) -> None:
    write(tmp_path, rows_of(100), zstd=False)
    reader = reader_of(tmp_path, 100)
    read(reader, [0], 100)
    os.truncate(shard_file(tmp_path), 250)
    with pytest.raises(CorruptShardError, match=f"{shard_file(tmp_path)}: row 2 is cut short"):
        read(reader, [2], 100)


TWO63 = 1 << 63


@pytest.mark.parametrize("zstd", [False, True], ids=["plain", "zstd"])
@pytest.mark.parametrize(
    "place",
    [
        (1, 104),
        (10**15, 104),
        (TWO63 - 1, 104),
        (TWO63, 104),
        (2 * TWO63 - 2, 104),
        (2 * TWO63 - 1, 104),
        (0, 10**15),
        (0, TWO63 - 1),
        (0, 2 * TWO63 - 2),
        (0, 2 * TWO63 - 1),
        (0, 0),
        (0, 4),
    ],
)
def test_an_index_that_lies_is_refused_whatever_it_says(
    tmp_path: Path, storage_kind: str, place: tuple[int, int], zstd: bool
) -> None:
    """Its checksum is right: somebody made it so."""
    index = struct.pack("<8Q", *place, *([2 * TWO63 - 1] * 6))
    shard_file(tmp_path).parent.mkdir(parents=True)
    shard_file(tmp_path).write_bytes(bytes(104) + with_crc(index))
    with pytest.raises(CorruptShardError, match="row 0 is cut short, or its index places it outside the file"):
        read(reader_of(tmp_path, 100, zstd=zstd, kind=storage_kind), [0], 100)


def zstd_frame(content_bytes: int) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(bytes(content_bytes))


@pytest.mark.parametrize(
    ("chunk", "reason"),
    [
        (b"no zstd frame at all", "is not a zstd frame"),
        (zstd_frame(100)[:-3], "does not hold the 100 bytes|is not a zstd frame"),
        (zstd_frame(99), "does not hold the 100 bytes"),
        (zstd_frame(101), "does not hold the 100 bytes"),
        (zstd_frame(1 << 28)[:100], "does not hold the 100 bytes"),  # 256 MB, if one believed it
        (zstd_frame(100) + zstd_frame(1), "does not hold the 100 bytes"),
        (zstd_frame(100) + b"more", "is not a zstd frame"),
        (zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100)), "does not hold the 100 bytes"),
    ],
    ids=["garbage", "cut", "short", "long", "bomb", "two", "trailing", "unsized"],
)
def test_a_frame_that_is_not_one_row_is_refused(tmp_path: Path, chunk: bytes, reason: str) -> None:
    shard_file(tmp_path).parent.mkdir(parents=True)
    shard_file(tmp_path).write_bytes(encode_shard([chunk], SHARD_IMAGES))
    with pytest.raises(CorruptShardError, match=f"{shard_file(tmp_path)}: row 0 ({reason}).*repair"):
        read(reader_of(tmp_path, 100, zstd=True), [0], 100)


def test_a_file_that_cannot_be_read_is_a_storage_error(tmp_path: Path) -> None:
    shard_file(tmp_path).mkdir(parents=True)
    with pytest.raises(StorageError, match=f"cannot read {shard_file(tmp_path)}: Is a directory"):
        read(reader_of(tmp_path, 100), [0], 100)


def test_one_error_stops_the_batch_and_leaves_no_thread_writing_into_it(tmp_path: Path) -> None:
    write(tmp_path, rows_of(LARGE), zstd=False)
    flip(shard_file(tmp_path, 1), 3)
    reader = reader_of(tmp_path, LARGE)
    for _ in range(20):
        out = np.zeros((8, LARGE), np.uint8)
        with pytest.raises(CorruptShardError, match="row 4 does not match"):
            reader.read(0, np.array([0, 1, 4, 6, 8, 10, 11, 12]), out, threads=4)
        before = out.copy()
        time.sleep(0.001)
        np.testing.assert_array_equal(out, before)


# ---------------------------------------------------------------- descriptors, threads, processes


def open_files(folder: Path) -> int:
    """How many descriptors of this process lead below a folder."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc here to count descriptors in")
    gc.collect()
    links = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return sum(link.startswith(f"{folder}/") for link in links)


def test_descriptors_stay_bounded_and_are_closed_with_the_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_shards, "MAX_OPEN_FILES", 2)
    write(tmp_path, rows_of(100), zstd=False)
    reader = reader_of(tmp_path, 100)
    read(reader, [0, 4, 8, 12], 100, threads=3)
    assert open_files(tmp_path) == 2
    del reader
    assert open_files(tmp_path) == 0


def test_damage_leaks_no_descriptor(tmp_path: Path) -> None:
    write(tmp_path, rows_of(100), zstd=False)
    flip(shard_file(tmp_path), shard_file(tmp_path).stat().st_size - 1)
    reader = reader_of(tmp_path, 100)
    for _ in range(3):
        with pytest.raises(CorruptShardError):
            read(reader, [0], 100)
    assert open_files(tmp_path) == 0


def test_a_shard_replaced_by_a_repair_is_read_anew_once_its_descriptor_was_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_shards, "MAX_OPEN_FILES", 1)
    rows = rows_of(100)
    write(tmp_path, rows, zstd=True)
    reader = reader_of(tmp_path, 100, zstd=True)
    read(reader, [0, 1], 100)
    rows[:4] = rows[:4, ::-1]
    rows[0] = 0  # compresses to another length, so that every chunk moves
    shard_file(tmp_path).unlink()
    write(tmp_path, rows, zstd=True)
    read(reader, [12], 100)
    np.testing.assert_array_equal(read(reader, [0, 1], 100)[0], rows[:2])


@pytest.mark.parametrize("zstd", [False, True], ids=["plain", "zstd"])
def test_after_an_error_or_a_hole_the_file_is_looked_at_anew(tmp_path: Path, storage_kind: str, zstd: bool) -> None:
    """A repair or a build may go on beside an open cache."""
    rows = rows_of(100)
    write(tmp_path, rows[:2], zstd=zstd)  # a last shard that is short
    reader = reader_of(tmp_path, 100, zstd=zstd, kind=storage_kind)
    assert read(reader, [0, 1, 3], 100)[1] == [2]
    shard_file(tmp_path).unlink()
    write(tmp_path, rows[:4], zstd=zstd)
    np.testing.assert_array_equal(read(reader, [0, 1, 3], 100)[0], rows[[0, 1, 3]])
    flip(shard_file(tmp_path), 1)
    with pytest.raises(CorruptShardError):
        read(reader, [0], 100)
    shard_file(tmp_path).unlink()
    write(tmp_path, rows[:4], zstd=zstd)
    np.testing.assert_array_equal(read(reader, [0], 100)[0], rows[:1])


def test_an_index_kept_no_longer_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage_kind: str
) -> None:
    monkeypatch.setattr(known_shards, "MAX_KEPT_SHARDS", 1)
    rows = rows_of(100)
    write(tmp_path, rows, zstd=False)
    reader = reader_of(tmp_path, 100, kind=storage_kind)
    for _ in range(3):
        np.testing.assert_array_equal(read(reader, [0, 4, 13], 100, threads=2)[0], rows[[0, 4, 13]])


@pytest.mark.parametrize("zstd", [False, True], ids=["plain", "zstd"])
def test_many_callers_at_once_get_what_one_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zstd: bool) -> None:
    monkeypatch.setattr(
        known_shards, "MAX_OPEN_FILES", 1
    )  # every read of another shard gives up the last one's descriptor
    rows = rows_of(3000)
    write(tmp_path, rows, zstd=zstd)
    reader = reader_of(tmp_path, 3000, zstd=zstd)
    usable = [row for row in range(NUM_ROWS) if row not in HOLES]
    batches = [np.random.default_rng(seed).choice(usable, 9).tolist() for seed in range(100)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda wanted: read(reader, wanted, 3000, threads=2)[0], batches))
    for wanted, out in zip(batches, results, strict=True):
        np.testing.assert_array_equal(out, rows[wanted])


def test_a_pickled_reader_reads_the_same(tmp_path: Path) -> None:
    rows = rows_of(100)
    write(tmp_path, rows, zstd=False)
    reader = reader_of(tmp_path, 100)
    read(reader, [0], 100)
    np.testing.assert_array_equal(read(pickle.loads(pickle.dumps(reader)), [1, 12], 100)[0], rows[[1, 12]])


def checksum(reader: ShardReader) -> int:
    """In a child: signal.alarm ends it if a lock that a thread of the parent held is held here for ever."""
    signal.alarm(20)
    return crc32c(read(reader, [0, 13, 4, 7], 3000, threads=3)[0].tobytes())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the mixture of threads and fork is the point
def test_a_fork_while_other_threads_read_leaves_a_reader_that_works(tmp_path: Path) -> None:
    write(tmp_path, rows_of(3000), zstd=True)
    reader = reader_of(tmp_path, 3000, zstd=True)
    expected, stop = checksum(reader), threading.Event()
    signal.alarm(0)

    def keep_reading() -> None:
        while not stop.is_set():
            read(reader, [1, 2, 12], 3000, threads=2)

    busy = [threading.Thread(target=keep_reading) for _ in range(3)]
    for thread in busy:
        thread.start()
    try:
        for _ in range(8):
            child = os.fork()
            if child == 0:
                os._exit(0 if checksum(reader) == expected and checksum(reader) == expected else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        for thread in busy:
            thread.join()


def test_a_spawned_process_reads_the_same(tmp_path: Path) -> None:
    write(tmp_path, rows_of(3000), zstd=True)
    reader = reader_of(tmp_path, 3000, zstd=True)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        theirs = np.frombuffer(pool.apply(_rows_in_child, (reader,)), np.uint8).reshape(3, 3000)
    np.testing.assert_array_equal(theirs, rows_of(3000)[[13, 1, 8]])


def _rows_in_child(reader: ShardReader) -> bytes:
    return read(reader, [13, 1, 8], 3000, threads=2)[0].tobytes()
