"""Checksums of stored bytes: crc32c of chunks, files and parts."""

from collections.abc import Sequence

import google_crc32c
import numpy as np

from radio_cache.native import rows as compiled

CRC_BYTES = 4


Chunk = bytes | memoryview
"""Stored bytes of a chunk; a memoryview is flat and counts bytes."""


def crc32c(data: bytes | memoryview, crc: int = 0) -> int:
    """Return the CRC-32C (Castagnoli) of the bytes, without copying them.

    Args:
        data: the bytes.
        crc: of the bytes before these.
    """
    if compiled is not None:  # several times faster, and other threads go on meanwhile
        return compiled.crc32c(data, crc)
    # As an array, whose memory the library reads without a copy.
    return google_crc32c.extend(crc, np.frombuffer(data, dtype=np.uint8))


def file_crc32c(data: bytes) -> int:
    """Return the checksum of a file that receipts record: the crc32c of all but its last four bytes.

    Those are a checksum already, of a plain chunk or of a shard's index. Over a plain chunk with its checksum the
    result would be the same constant for every chunk.
    """
    return crc32c(memoryview(data)[:-CRC_BYTES])


def parts_crc32c(parts: Sequence[Chunk]) -> int:
    """Return `file_crc32c` of the file that consists of these parts; the last part is its last four bytes."""
    crc = 0
    for part in parts[:-1]:
        crc = crc32c(part, crc)
    return crc


def with_crc(data: bytes) -> bytes:
    """Return the bytes followed by their crc32c, as Zarr's `crc32c` codec stores a chunk."""
    return data + closing_crc(data)


def closing_crc(data: Chunk) -> bytes:
    """Return the four bytes that end a chunk: its crc32c, little-endian."""
    return crc32c(data).to_bytes(CRC_BYTES, "little")
