"""The bytes of a shard: Zarr v3's `sharding_indexed` codec, inner codecs `bytes` (little endian) and `crc32c`.

Layout: the chunks one after the other, each followed by its own crc32c, then the index (offset and length of every
chunk as two little-endian uint64, both 2^64 - 1 for a missing chunk), then the index's crc32c. Before the index
lies a label that no chunk covers and that identifies the shard. The first caches have none. Any Zarr v3 library reads it.
radio-cache reads and writes it itself because that is several times faster (docs/design/001-store.md).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import CorruptShardError
from radio_cache.format.checksums import CRC_BYTES, Chunk, closing_crc, crc32c

ABSENT = np.uint64(2**64 - 1)

# Swapped shard files pass all checksums, so a label binds a file to its path.
_LABEL = b"rc-shard"
LABEL_BYTES = len(_LABEL) + CRC_BYTES


def index_bytes(chunks_per_shard: int) -> int:
    """Size of the index at the end of a shard."""
    return 16 * chunks_per_shard + CRC_BYTES


def shard_label(path: str) -> bytes:
    """Return the label before the index of the shard at a path below the cache, since chunks do not identify their shard."""
    return _LABEL + crc32c(path.encode()).to_bytes(CRC_BYTES, "little")


def is_mislabelled(label: bytes, path: str) -> bool:
    """Return whether the bytes before an index are a label, and that of another shard than the one at `path`."""
    return label.startswith(_LABEL) and label != shard_label(path)


def encode_shard(chunks: Sequence[Chunk | None], chunks_per_shard: int) -> bytes:
    """Return a whole shard. None marks a missing chunk, as do chunks beyond the end of a short last shard."""
    return b"".join(shard_parts(chunks, chunks_per_shard))


def shard_parts(chunks: Sequence[Chunk | None], chunks_per_shard: int, path: str | None = None) -> list[Chunk]:
    """Return the parts of a shard in order. The chunks themselves are not copied.

    Args:
        chunks: with their checksums; None for a missing chunk.
        chunks_per_shard: length of the index.
        path: of the shard below the cache, for its label.
    """
    # (chunks, 2) offset and length. Chunks that are not set stay absent.
    index = np.full((chunks_per_shard, 2), ABSENT, dtype="<u8")
    parts: list[Chunk] = []
    offset = 0
    for number, chunk in enumerate(chunks):
        if chunk is None:
            continue
        parts += (chunk, closing_crc(chunk))
        index[number] = (offset, len(chunk) + CRC_BYTES)
        offset += len(chunk) + CRC_BYTES
    last = index.tobytes()
    if path is not None:
        # No entry of the index covers the label, so other Zarr libraries pass over it.
        parts.append(shard_label(path))
    return [*parts, last, closing_crc(last)]


def decode_index(data: bytes, path: Path | str) -> NDArray[np.uint64]:
    """Return the (chunks, 2) offsets and lengths in the last bytes of a shard.

    Raises:
        CorruptShardError: naming `path`.
    """
    body, stored = data[:-CRC_BYTES], int.from_bytes(data[-CRC_BYTES:], "little")
    if crc32c(body) != stored:
        raise CorruptShardError(f"{path}: the index at the end of this shard does not match its checksum")
    return np.frombuffer(body, dtype="<u8").reshape(-1, 2)
