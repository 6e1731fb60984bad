"""The bytes of a shard: zarr-python is the judge, not our own reader."""

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from radio_cache.errors import CorruptShardError
from radio_cache.format.checksums import CRC_BYTES, crc32c, with_crc
from radio_cache.shards.encoding import decode_index, encode_shard, index_bytes


def test_crc32c_is_the_castagnoli_checksum() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of every catalogue of CRCs
    assert crc32c(b"") == 0
    assert with_crc(b"123456789") == b"123456789\x83\x92\x06\xe3"


@pytest.mark.parametrize("held", [[True] * 4, [False, True, True, False], [True, True], [False] * 4], ids=str)
def test_a_shard_is_byte_for_byte_what_zarr_python_writes(tmp_path: Path, held: list[bool]) -> None:
    chunks = np.random.default_rng(0).normal(size=(4, 6)).astype("<f4")
    array = zarr.create_array(
        tmp_path,
        shape=(4, 6),
        chunks=(4, 6),
        dtype="float32",
        compressors=None,
        filters=None,
        fill_value=float("nan"),
        serializer=ShardingCodec(
            chunk_shape=(1, 6),
            codecs=[BytesCodec(endian="little"), Crc32cCodec()],
            index_codecs=[BytesCodec(endian="little"), Crc32cCodec()],
            index_location="end",
        ),
    )
    ours = encode_shard([row.tobytes() if there else None for row, there in zip(chunks, held, strict=False)], 4)
    (tmp_path / "c/0").mkdir(parents=True)
    (tmp_path / "c/0/0").write_bytes(ours)
    there = np.array(held + [False] * (4 - len(held)))
    np.testing.assert_array_equal(array[:], np.where(there[:, None], chunks, np.nan))
    if there.all():
        array[:] = chunks
        assert (tmp_path / "c/0/0").read_bytes() == ours


@settings(max_examples=50, deadline=None)
@given(st.lists(st.none() | st.binary(min_size=1, max_size=40), max_size=6), st.integers(0, 3))
def test_the_index_says_where_every_chunk_lies(chunks: list[bytes | None], empty_slots: int) -> None:
    slots = len(chunks) + empty_slots + 1
    shard = encode_shard(chunks, slots)
    index = decode_index(shard[-index_bytes(slots) :], Path("shard"))
    for number in range(slots):
        chunk = chunks[number] if number < len(chunks) else None
        offset, length = (int(value) for value in index[number])
        if chunk is None:
            assert offset == length == 2**64 - 1
        else:
            assert shard[offset : offset + length] == with_crc(chunk)


@settings(max_examples=50, deadline=None)
@given(position=st.integers(0, index_bytes(3) - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_of_the_index_is_noticed(position: int, bit: int) -> None:
    data = bytearray(encode_shard([b"one", None, b"three"], 3)[-index_bytes(3) :])
    data[position] ^= 1 << bit
    with pytest.raises(CorruptShardError, match=r"some/shard: the index .* does not match its checksum"):
        decode_index(bytes(data), Path("some/shard"))


def test_an_index_has_sixteen_bytes_a_chunk_and_a_checksum() -> None:
    assert index_bytes(128) == 128 * 16 + CRC_BYTES
