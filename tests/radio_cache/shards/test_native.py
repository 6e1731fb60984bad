"""The compiled reader by itself: its checksum, rows in the page cache and not, and arguments that do not fit."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radio_cache.native import rows as _rows

if _rows is None:
    pytest.skip("not built: no compiler, not an x86-64 processor, or an older build", allow_module_level=True)


WAYS = pytest.mark.parametrize("lanes", [False, True], ids=["the processor's best way", "lanes"])


@WAYS
def test_its_checksum_is_crc32c(lanes: bool) -> None:
    """Of every length up to a page, from every alignment."""
    memory = np.random.default_rng(0).integers(0, 256, 4096 + 64, np.uint8)
    for length in range(4097):
        data = memory[length % 64 :][:length]
        assert _rows.crc32c(data, 0, lanes) == google_crc32c.value(data), length


@WAYS
@given(st.integers(0, 40_000), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_its_checksum_of_longer_data(lanes: bool, length: int, start: int, seed: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, start + length, np.uint8)[start:]
    assert _rows.crc32c(data, 0, lanes) == google_crc32c.value(data)


@WAYS
@pytest.mark.parametrize("length", [3 * 4096 - 1, 3 * 4096, 3 * 4096 + 1, 6 * 4096 + 7, (256 << 10) + 3])
def test_its_checksum_at_the_edges_of_lanes(lanes: bool, length: int) -> None:
    data = np.random.default_rng(length).bytes(length)
    assert _rows.crc32c(data, 0, lanes) == google_crc32c.value(data)


@WAYS
@given(st.binary(max_size=2000), st.binary(max_size=2000))
def test_its_checksum_goes_on_from_another(lanes: bool, first: bytes, second: bytes) -> None:
    assert _rows.crc32c(second, _rows.crc32c(first), lanes) == google_crc32c.value(first + second)


class File:
    """Chunks of a file, one after the other, each with its checksum."""

    def __init__(self, path: Path, rows: list[bytes]) -> None:
        self.rows = rows
        chunks = [row + google_crc32c.value(row).to_bytes(4, "little") for row in rows]
        self.ends = np.cumsum([len(chunk) for chunk in chunks])
        path.write_bytes(b"".join(chunks))
        self.descriptor = os.open(path, os.O_RDWR)
        os.fsync(self.descriptor)

    def flip(self, row: int) -> None:
        """Damage the first byte of a row."""
        os.pwrite(self.descriptor, bytes([self.rows[row][0] ^ 1]), self._offset(row))

    def drop_from_page_cache(self) -> None:
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def read(self, wanted: list[int], *, threads: int = 1, unchecked: int | None = None) -> tuple[object, list[bytes]]:
        """What the compiled code says, and the rows as they lie in its buffer, last one first."""
        lengths = np.array([len(self.rows[row]) for row in wanted])
        ends = np.cumsum(lengths[::-1])[::-1]
        out = np.empty(int(lengths.sum()), np.uint8)
        check = np.array([row != unchecked for row in wanted], np.uint8)
        offsets = np.array([self._offset(row) for row in wanted])
        descriptors = np.full(len(wanted), self.descriptor, np.int32)
        status = _rows.read(descriptors, offsets, lengths, ends - lengths, check, out, threads)
        return status, [out[end - length : end].tobytes() for end, length in zip(ends, lengths, strict=True)]

    def expect(self, wanted: list[int], *, threads: int = 1) -> None:
        """Read rows that are right."""
        status, found = self.read(wanted, threads=threads)
        assert status is None
        assert found == [self.rows[row] for row in wanted]

    def _offset(self, row: int) -> int:
        return int(self.ends[row]) - len(self.rows[row]) - 4


@pytest.fixture
def file_of(tmp_path: Path) -> Iterator[Callable[[list[int]], File]]:
    files: list[File] = []

    def make(lengths: list[int]) -> File:
        rng = np.random.default_rng(0)
        files.append(File(tmp_path / str(len(files)), [rng.bytes(length) for length in lengths]))
        return files[-1]

    yield make
    for file in files:
        os.close(file.descriptor)


@pytest.mark.parametrize("row_bytes", [1, 1000, 256 << 10, (256 << 10) + 1, 700_000])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_are_read_and_a_flipped_bit_is_found(
    file_of: Callable[[list[int]], File], row_bytes: int, cached: bool, threads: int
) -> None:
    file = file_of([row_bytes] * 5)
    if not cached:
        file.drop_from_page_cache()
    file.expect([4, 0, 2, 0], threads=threads)
    file.flip(3)
    assert file.read([4, 3, 2, 0], threads=threads)[0] == (1, _rows.OTHER_BYTES, 0)
    assert file.read([4, 3, 2, 0], threads=threads, unchecked=3)[0] is None
    os.ftruncate(file.descriptor, int(file.ends[4]) - 1)
    assert file.read([2, 0, 4], threads=threads)[0] == (2, _rows.CUT_SHORT, 0)


def test_rows_of_different_lengths_go_where_they_are_wanted(file_of: Callable[[list[int]], File]) -> None:
    file_of([1, 5000, 300_000, 17, 4096]).expect([2, 0, 4, 3, 1, 1])


def test_an_error_of_the_system_comes_back_as_its_number(file_of: Callable[[list[int]], File]) -> None:
    file = file_of([100])
    one = np.zeros(1, np.int64)
    status = _rows.read(np.full(1, -1, np.int32), one, one + 100, one, np.ones(1, np.uint8), np.empty(100, np.uint8), 1)
    assert status is not None
    assert status[2] == errno.EBADF
    file.expect([0])


def test_many_callers_share_the_helpers(file_of: Callable[[list[int]], File]) -> None:
    """Batches of 6 MB, so that each asks for helpers; some of them end with an error."""
    file = file_of([100_000 + number for number in range(64)])
    file.flip(40)
    rng = np.random.default_rng(1)
    batches = [rng.integers(0, 64, 60).tolist() for _ in range(24)]

    def read(wanted: list[int]) -> bool:
        status, found = file.read(wanted, threads=5)
        if status is None:
            return 40 not in wanted and found == [file.rows[row] for row in wanted]
        return 40 in wanted and status[1] == _rows.OTHER_BYTES and wanted[status[0]] == 40  # type: ignore[index]

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, batches))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the mixture of threads and fork is the point
def test_a_fork_while_helpers_read_leaves_a_child_with_its_own(file_of: Callable[[list[int]], File]) -> None:
    file = file_of([200_000] * 20)
    stop = threading.Event()

    def read_on() -> None:
        while not stop.is_set():
            file.expect(list(range(20)), threads=4)

    reader = threading.Thread(target=read_on)
    reader.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                try:
                    file.expect(list(range(19, -1, -1)), threads=4)
                    os._exit(0)
                finally:
                    os._exit(1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        reader.join()
    file.expect([7], threads=4)


@pytest.mark.parametrize(
    ("place", "length"), [(-1, 10), (11, 10), (0, 21), (0, 0), (0, -5), (2**62, 10), (1, 2**63 - 1)]
)
def test_a_row_outside_the_buffer_is_refused(place: int, length: int) -> None:
    one = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="fit"):
        _rows.read(
            np.zeros(1, np.int32), one, one + length, one + place, np.zeros(1, np.uint8), np.empty(20, np.uint8), 1
        )


def test_lists_of_different_lengths_are_refused() -> None:
    one = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="lengths"):
        _rows.read(np.zeros(2, np.int32), one, one + 1, one, np.zeros(1, np.uint8), np.empty(20, np.uint8), 1)
