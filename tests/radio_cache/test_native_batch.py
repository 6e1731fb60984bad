"""The compiled reader by itself: its checksum, rows in the page cache and not, and arguments that do not fit."""

import os
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

_rows = pytest.importorskip("radio_cache._rows", reason="not built: no compiler, or not an x86-64 processor")


@given(st.integers(0, 40_000), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_its_checksum_is_crc32c(length: int, start: int, seed: int) -> None:
    """Also of what is not aligned, and at the edges of the three lanes."""
    data = np.random.default_rng(seed).integers(0, 256, start + length, np.uint8)[start:]
    assert _rows.crc32c(data) == google_crc32c.value(data.tobytes())


@pytest.mark.parametrize("length", [3 * 4096 - 1, 3 * 4096, 3 * 4096 + 1, 6 * 4096 + 7, (256 << 10) + 3])
def test_its_checksum_at_the_edges(length: int) -> None:
    data = np.random.default_rng(length).bytes(length)
    assert _rows.crc32c(data) == google_crc32c.value(data)


@pytest.mark.parametrize("row_bytes", [1, 1000, 256 << 10, (256 << 10) + 1, 700_000])
@pytest.mark.parametrize("cached", [True, False])
def test_rows_are_read_and_a_flipped_bit_is_found(tmp_path: Path, row_bytes: int, cached: bool) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (5, row_bytes), np.uint8)
    chunks = [row.tobytes() + google_crc32c.value(row.tobytes()).to_bytes(4, "little") for row in rows]
    chunks[3] = bytes([chunks[3][0] ^ 1]) + chunks[3][1:]
    file = tmp_path / "rows"
    file.write_bytes(b"".join(chunks))
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if not cached:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        wanted, positions = np.array([4, 0, 2, 0]), np.array([1, 3, 0, 2])
        out = np.empty((4, row_bytes), np.uint8)
        places = (np.full(4, descriptor, np.int32), wanted * (row_bytes + 4), positions)
        assert _rows.read(*places, np.ones(4, np.uint8), out, row_bytes) is None
        np.testing.assert_array_equal(out[positions], rows[wanted])

        wanted[1] = 3
        places = (places[0], wanted * (row_bytes + 4), positions)
        assert _rows.read(*places, np.ones(4, np.uint8), out, row_bytes) == (1, _rows.OTHER_BYTES, 0)
        assert _rows.read(*places, np.array([1, 0, 1, 1], np.uint8), out, row_bytes) is None
        wanted[1] = 5
        places = (places[0], wanted * (row_bytes + 4), positions)
        assert _rows.read(*places, np.ones(4, np.uint8), out, row_bytes) == (1, _rows.CUT_SHORT, 0)
    finally:
        os.close(descriptor)
    status = _rows.read(*places, np.ones(4, np.uint8), out, row_bytes)
    assert status is not None
    assert status[2] == 9, "EBADF"


@pytest.mark.parametrize("position", [-1, 2])
def test_a_row_outside_the_buffer_is_refused(position: int) -> None:
    one = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="fit"):
        _rows.read(np.zeros(1, np.int32), one, one + position, np.zeros(1, np.uint8), np.empty(20, np.uint8), 10)


def test_lists_of_different_lengths_are_refused() -> None:
    one = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="lengths"):
        _rows.read(np.zeros(2, np.int32), one, one, np.zeros(1, np.uint8), np.empty(20, np.uint8), 10)
