"""The `zarr.json` documents of a cache, version 3 of Zarr: groups, plain arrays, sharded arrays. Pure: numbers in, bytes out.

Any Zarr library opens what is described here; writing needs none of them (tests/radio_cache/format/test_zarr_json.py).
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from radio_cache.errors import StoreError
from radio_cache.format.strict_json import MAX_INTEGER, parse_json

DOCUMENT = "zarr.json"

MAX_DOCUMENT_BYTES = 1 << 26
"""Longer documents are refused. That of a cache of a hundred thousand tars has ten megabytes."""

VARIABLE_BYTES, _EARLIER_BYTES = "bytes", "variable_length_bytes"
"""The registered name of byte strings of any length, and zarr-python's own one, which earlier caches have."""

_FREE_FIELDS = ("attributes", "dimension_names")
"""Of an array's document; the first caches have no names of dimensions."""

_BYTES: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC32C: dict[str, Any] = {"name": "crc32c"}


def group_document(attributes: Mapping[str, Any] | None = None) -> bytes:
    """Return the document of a group with these attributes."""
    return _dumped({"attributes": dict(attributes or {}), "zarr_format": 3, "node_type": "group"})


def plain_array_document(
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: np.dtype[Any] | str,
    fill_value: float,
    names: Sequence[str] | None = None,
) -> bytes:
    """Return the document of an uncompressed array whose chunks end with their crc32c.

    Args:
        shape: of the array.
        chunks: shape of a chunk.
        dtype: Zarr's name of the type.
        fill_value: of missing chunks.
        names: of its dimensions.
    """
    return _array(shape, chunks, np.dtype(dtype), fill_value, [_bytes_codec(np.dtype(dtype)), _CRC32C], names)


def sharded_array_document(
    shape: tuple[int, ...],
    shard: tuple[int, ...],
    chunk: tuple[int, ...],
    dtype: np.dtype[Any] | str,
    fill_value: float,
    zstd_level: int | None,
    names: Sequence[str] | None = None,
) -> bytes:
    """Return the document of an array of shard files with the index at their end.

    Args:
        shape: of the array.
        shard: shape of a shard.
        chunk: shape of an inner chunk; each ends with its crc32c.
        dtype: Zarr's name of the type.
        fill_value: of missing chunks.
        zstd_level: of compressed chunks; None for plain bytes.
        names: of its dimensions.
    """
    inner = [_bytes_codec(np.dtype(dtype))]
    if zstd_level is not None:
        # Without zstd's own checksum: the crc32c behind each chunk covers the same bytes.
        inner.append({"name": "zstd", "configuration": {"level": zstd_level, "checksum": False}})
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": list(chunk),
            "codecs": [*inner, _CRC32C],
            "index_codecs": [_BYTES, _CRC32C],
            "index_location": "end",
        },
    }
    return _array(shape, shard, np.dtype(dtype), fill_value, [sharding], names)


def with_shape(document: bytes, shape: tuple[int, ...]) -> bytes:
    """Return the document of the same array with another shape."""
    return _dumped(json.loads(document) | {"shape": list(shape)})


def attributes_of(document: bytes) -> dict[str, Any]:
    """Return the attributes of a group or an array.

    Raises:
        ValueError: for anything but such a document.
    """
    attributes = parse_json(document)["attributes"]
    if not isinstance(attributes, dict):
        raise TypeError("attributes are not an object")
    return attributes


def array_difference(stored: bytes, expected: bytes, *, grows_along: int | None = None) -> str | None:
    """Describe the difference between an array's document and the expected one; None without one.

    Attributes and names of dimensions do not count. Types are compared by meaning, whatever their spelling.

    Args:
        stored: the stored document.
        expected: the document that the cache's spec implies.
        grows_along: axis that may be longer than expected, because arrays are enlarged before the cache declares it.
    """
    try:
        # `.items()` raises for anything but a JSON object.
        theirs = dict(parse_json(stored).items())
        needed: dict[str, Any] = json.loads(expected)
        # Two names of one type.
        if theirs.get("data_type") == _EARLIER_BYTES:
            theirs["data_type"] = VARIABLE_BYTES
        longer = None if grows_along is None else theirs["shape"][grows_along]
        if grows_along is not None and type(longer) is int and needed["shape"][grows_along] < longer <= MAX_INTEGER:
            # A longer array along this axis counts as equal.
            needed["shape"][grows_along] = longer
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as exc:
        return f"does not describe a Zarr array ({exc!r})"
    # Fields that are not expected are ignored, since other tools may add some.
    for field, value in needed.items():
        if field not in _FREE_FIELDS and theirs.get(field) != value:
            return (
                f"says {field} is {json.dumps(theirs.get(field)):.200}, the cache's spec says {json.dumps(value)}: it was "
                "edited, or belongs to another cache"
            )
    return None


def shape_of(document: bytes, place: str) -> tuple[int, ...]:
    """Return the shape of an array.

    Raises:
        StoreError: with the place, for anything but such a document.
    """
    try:
        shape = parse_json(document)["shape"]
        if type(shape) is list and all(type(side) is int and 0 <= side <= MAX_INTEGER for side in shape):
            return tuple(shape)
    except (KeyError, TypeError, ValueError) as exc:
        raise StoreError(f"{place} does not describe a Zarr array: {exc}") from exc
    raise StoreError(f"{place} does not describe a Zarr array: its shape is {shape!r:.60}")


def _array(
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: np.dtype[Any],
    fill_value: float,
    codecs: list[Any],
    names: Sequence[str] | None,
) -> bytes:
    # Zarr requires an integer as fill value of an integer type.
    whole = np.issubdtype(dtype, np.integer)
    assert names is None or len(names) == len(shape), (names, shape)
    return _dumped(
        {
            "shape": list(shape),
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": int(fill_value) if whole else _json_float(fill_value),
            "codecs": codecs,
            "attributes": {},
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
            **({} if names is None else {"dimension_names": list(names)}),
        }
    )


def _bytes_codec(dtype: np.dtype[Any]) -> dict[str, Any]:
    # A type of one byte has no byte order.
    return _BYTES if dtype.itemsize > 1 else {"name": "bytes"}


def _json_float(value: float) -> float | str:
    # JSON has neither NaN nor infinities, so Zarr stores their names.
    return float(value) if math.isfinite(value) else {"nan": "NaN", "inf": "Infinity"}.get(str(value), "-Infinity")


def _dumped(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=2).encode()
