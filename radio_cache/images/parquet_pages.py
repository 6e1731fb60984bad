"""Byte ranges of the values of a Parquet column, for plain pages without compression.

Libraries read a whole column chunk, a hundred images for one. Page headers are Thrift structs in the compact
protocol (apache/parquet-format: Encodings.md, parquet.thrift). The values of a plain page of byte arrays follow each
other, each after its length.
"""

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Read = Callable[[int, int], bytes]
"""(offset, length) -> bytes of a file; fewer where it ends."""

# PageType and Encoding of parquet.thrift.
_DATA_PAGE, _DATA_PAGE_V2 = 0, 3
_PLAIN, _RLE = 0, 3
# A longer header runs out of bytes below (IndexError), and the page is left to a library.
_MAX_HEADER_BYTES = 1 << 14
_WINDOW_BYTES = 1 << 12
# Nested structs of a hostile header would otherwise exhaust the stack.
_MAX_DEPTH = 8


def value_ranges(
    read: Read, start: int, end: int, num_values: int, *, optional: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Return offsets and lengths (n,) of the values of an uncompressed column chunk of byte arrays, in row order.

    Only lengths are read, not the images themselves.

    Args:
        read: function that reads a range of the file.
        start: of the chunk in the file.
        end: of the chunk in the file.
        num_values: of the chunk.
        optional: whether values may be null, so that a page begins with levels.

    Returns:
        None if a page is not plain, has nulls, or is malformed. A library then reads it, or reports the error.
    """
    # A value takes at least the 4 bytes of its length. A hostile count is refused before arrays are allocated for it.
    if num_values * 4 > end - start:
        return None
    read = _windowed(read)
    offsets = np.empty(num_values, np.int64)
    lengths = np.empty(num_values, np.int64)
    known, at = 0, start
    try:
        while known < num_values:
            header, header_bytes = _parsed(read(at, _MAX_HEADER_BYTES) if at < end else b"")
            first = at + header_bytes
            # Field 3 of PageHeader is the compressed size, which equals the plain one here.
            at = first + header[3]
            kind, count, skipped = _page(header, read, first, optional=optional)
            if kind != _PLAIN or known + count > num_values or at > end:
                return None
            value = first + skipped
            for row in range(known, known + count):
                if value + 4 > at:
                    return None  # fewer values than rows: some are null
                (length,) = struct.unpack("<I", read(value, 4))
                offsets[row], lengths[row] = value + 4, length
                value += 4 + length
            # Bytes are left over, so the page is not what its header declares.
            if value != at:
                return None
            known += count
    except (IndexError, KeyError, TypeError, ValueError, struct.error):
        return None
    return offsets, lengths


def _page(header: dict[int, Any], read: Read, first: int, *, optional: bool) -> tuple[int, int, int]:
    """Return (encoding, values with nulls, bytes of levels before the first value) of a data page."""
    # PageHeader: 1 type, 5 data_page_header, 8 data_page_header_v2.
    if header[1] == _DATA_PAGE_V2:
        page = header[8]
        # DataPageHeaderV2: 1 num_values, 4 encoding, 5 and 6 lengths of the levels in bytes.
        return page[4], page[1], page[5] + page[6]
    if header[1] != _DATA_PAGE or (optional and header[5][3] != _RLE):
        raise ValueError
    # Version 1 stores the levels behind their own length of 4 bytes.
    levels = 4 + struct.unpack("<I", read(first, 4))[0] if optional else 0
    return header[5][2], header[5][1], levels


def _windowed(read: Read) -> Read:
    """Return a reader that fetches at least some thousand bytes at once, since small values come many at a time."""
    start, held = 0, b""

    def windowed(offset: int, length: int) -> bytes:
        nonlocal start, held
        if not (start <= offset and offset + length <= start + len(held)):
            start, held = offset, read(offset, max(length, _WINDOW_BYTES))
        return held[offset - start : offset - start + length]

    return windowed


def _parsed(data: bytes) -> tuple[dict[int, Any], int]:
    """Return a Thrift struct by field number, and how many bytes it has. Raises IndexError where the bytes end too early."""
    return _struct(data, 0, 0)


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    if depth > _MAX_DEPTH:
        raise ValueError
    fields: dict[int, Any] = {}
    number = 0
    while data[at]:
        # The high bits hold the distance from the last field number; 0 announces a number in full.
        delta, kind = data[at] >> 4, data[at] & 15
        at += 1
        if delta:
            number += delta
        else:
            raw, at = _varint(data, at)
            number = _zigzag(raw)
        fields[number], at = _value(data, at, kind, depth)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    match kind:
        case 1 | 2:  # the boolean is the type
            return kind == 1, at
        case 3:  # a byte
            return data[at], at + 1
        case 4 | 5 | 6:  # 16, 32 and 64 bits
            raw, at = _varint(data, at)
            return _zigzag(raw), at
        case 7:
            return struct.unpack_from("<d", data, at)[0], at + 8
        case 8:  # a string
            length, at = _varint(data, at)
            return data[at : at + length], at + length
        case 12:
            return _struct(data, at, depth + 1)
        case _:
            raise ValueError  # page headers have no lists


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        # At most 64 bits: a hostile run of continuation bits ends here.
        if byte < 128 or shift > 63:
            return value, at


def _zigzag(raw: int) -> int:
    return (raw >> 1) ^ -(raw & 1)
