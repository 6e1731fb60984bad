"""Documents: zarr-python opens them, and finds what it would have written itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec

from radio_cache.errors import StoreError
from radio_cache.format.zarr_json import (
    attributes_of,
    group_document,
    plain_array_document,
    shape_of,
    sharded_array_document,
    with_shape,
)


def theirs(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "zarr.json").read_bytes())


def test_a_group_is_the_one_zarr_python_writes(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "g", zarr_format=3, attributes={"radio_cache": {"a": [1, None]}})
    document = group_document({"radio_cache": {"a": [1, None]}})
    assert json.loads(document) == theirs(tmp_path / "g")
    assert attributes_of(document) == {"radio_cache": {"a": [1, None]}}


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        ("uint8", 0),
        ("int8", -128),
        ("int32", 0),
        ("uint64", 0),
        ("float16", np.nan),
        ("float64", np.nan),
        ("float32", 1.5),
    ],
)
def test_a_plain_array_is_the_one_zarr_python_writes(tmp_path: Path, dtype: str, fill: float) -> None:
    zarr.create_array(
        tmp_path / "a",
        shape=(5, 2),
        dtype=dtype,
        chunks=(2, 2),
        compressors=(Crc32cCodec(),),
        filters=None,
        fill_value=fill,
    )
    assert json.loads(plain_array_document((5, 2), (2, 2), dtype, fill)) == theirs(tmp_path / "a")


@pytest.mark.parametrize("zstd_level", [None, 3])
@pytest.mark.parametrize("dtype", ["<f2", "int8"])
def test_a_sharded_array_is_the_one_zarr_python_writes(tmp_path: Path, dtype: str, zstd_level: int | None) -> None:
    compressors = [] if zstd_level is None else [ZstdCodec(level=zstd_level)]
    sharding = ShardingCodec(
        chunk_shape=(1, 1, 4, 3),
        codecs=[BytesCodec(endian="little"), *compressors, Crc32cCodec()],
        index_codecs=[BytesCodec(endian="little"), Crc32cCodec()],
        index_location="end",
    )
    fill = np.nan if dtype == "<f2" else -128
    zarr.create_array(
        tmp_path / "a",
        shape=(1, 5, 4, 3),
        dtype=dtype,
        chunks=(1, 2, 4, 3),
        serializer=sharding,
        compressors=None,
        filters=None,
        fill_value=fill,
    )
    assert json.loads(
        sharded_array_document((1, 5, 4, 3), (1, 2, 4, 3), (1, 1, 4, 3), dtype, fill, zstd_level)
    ) == theirs(tmp_path / "a")


def test_an_array_can_be_described_larger() -> None:
    document = plain_array_document((5,), (2,), "uint8", 0)
    assert with_shape(document, (7,)) == plain_array_document((7,), (2,), "uint8", 0)
    assert shape_of(with_shape(document, (7,)), "x") == (7,)


@pytest.mark.parametrize(
    "document", [b"", b"[]", b"{}", b'{"shape": [-1]}', b'{"shape": ["a"]}', b'{"shape": 3}', b"\xff"]
)
def test_what_is_no_array_is_named(document: bytes) -> None:
    with pytest.raises(StoreError, match="images/status does not describe a Zarr array"):
        shape_of(document, "images/status")
