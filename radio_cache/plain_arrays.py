"""Arrays of a cache without shards: uncompressed chunks, each followed by its crc32c. Read without a Zarr library."""

import json
import math
from collections.abc import Callable
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import CorruptShardError, LimitError, StoreError
from radio_cache.shards import CRC_BYTES, crc32c
from radio_cache.storage import Storage
from radio_cache.zarr_documents import DOCUMENT, shape_of

MAX_CHUNK_BYTES = 1 << 31
"""Larger chunks than this are nobody's."""

_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
)}  # fmt: skip
_CODECS = (["bytes"], ["bytes", "crc32c"])

Damaged = Callable[[str, str], StoreError]
"""Makes the error for a damaged file: its path below the array, and what is wrong with it."""


@final
class PlainArray:
    """One array, opened. Chunks that are not there hold the fill value. Safe to share between threads.

    Raises StoreError if there is no array at `path`, or one that was not written by this library; LimitError if its
    chunks are too large to be true.
    """

    def __init__(self, storage: Storage, path: str, *, damaged: Damaged | None = None) -> None:
        self._storage, self._path = storage, path
        self._damaged = damaged or self._damaged_file
        place = storage.at(f"{path}/{DOCUMENT}")
        try:
            document = storage.read(f"{path}/{DOCUMENT}")
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise self._damaged(DOCUMENT, "it is gone") from exc
        self.shape = shape_of(document, place)
        try:
            data = json.loads(document)
            codecs = [codec["name"] for codec in data["codecs"]]
            self.chunks = tuple(data["chunk_grid"]["configuration"]["chunk_shape"])
            self.dtype = _DTYPES[data["data_type"]]
            fill = data["fill_value"]
            self.fill_value = np.nan if fill == "NaN" else np.array(fill, self.dtype)[()]
            big = self.dtype.itemsize > 1 and data["codecs"][0].get("configuration", {}).get("endian") != "little"
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as exc:
            raise StoreError(f"{place} does not describe an array of a cache: {exc!r}") from exc
        sides_fit = len(self.chunks) == len(self.shape) and all(type(side) is int and side > 0 for side in self.chunks)
        if codecs not in _CODECS or not sides_fit or big:
            raise StoreError(f"{place} does not describe an array of a cache: codecs {codecs}, chunks {self.chunks}")
        self._crc_bytes = CRC_BYTES if "crc32c" in codecs else 0
        if math.prod(self.chunks) * self.dtype.itemsize > MAX_CHUNK_BYTES:
            raise LimitError(
                f"{place} declares chunks of {self.chunks} {self.dtype}, more than {MAX_CHUNK_BYTES} bytes"
            )

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks along each axis."""
        return tuple(-(-side // chunk) for side, chunk in zip(self.shape, self.chunks, strict=True))

    def expect(self, shape: tuple[int, ...], *, grows: int = 0) -> "PlainArray":
        """Itself, with this shape. Raises the error of damage if it has another: nothing was allocated yet.

        grows: the axis along which it may be longer, because a cache that grows has its arrays enlarged first.
        """
        cut = (*self.shape[:grows], shape[grows], *self.shape[grows + 1 :])
        if cut != shape or self.shape[grows] < shape[grows]:
            raise self._damaged(DOCUMENT, f"it declares the shape {self.shape}, and the cache needs {shape}")
        self.shape = shape
        return self

    def read(self, *, holes: bool = True) -> NDArray[Any]:
        """The whole array. holes: whether chunks may be missing, and hold the fill value; otherwise they are damage."""
        out = np.full(self.shape, self.fill_value, self.dtype)
        for grid in np.ndindex(self.grid):
            found = self.stored_chunk(grid) if holes else self.chunk(grid, holes=False)
            if found is not None:
                places = tuple(
                    slice(at * side, min((at + 1) * side, end))
                    for at, side, end in zip(grid, self.chunks, self.shape, strict=True)
                )
                out[places] = found[tuple(slice(0, place.stop - place.start) for place in places)]
        return out

    def chunk(self, grid: tuple[int, ...], *, holes: bool = True) -> NDArray[Any]:
        """One chunk in its full shape, also at the array's end. holes: whether it may be missing."""
        found = self.stored_chunk(grid)
        if found is not None:
            return found
        if not holes:
            raise self._damaged(_chunk_key(grid), "it is gone")
        return np.full(self.chunks, self.fill_value, self.dtype)

    def stored_chunk(self, grid: tuple[int, ...]) -> NDArray[Any] | None:
        """One chunk in its full shape, or None if it is not stored. Raises what `damaged` makes, for one that is damaged."""
        file = _chunk_key(grid)
        expected = math.prod(self.chunks) * self.dtype.itemsize
        try:
            data, size = self._storage.read_tail(f"{self._path}/{file}", expected + self._crc_bytes)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if size != expected + self._crc_bytes:
            raise self._damaged(file, f"it has {size} bytes instead of {expected + self._crc_bytes}")
        body = memoryview(data)[:expected]
        if self._crc_bytes and crc32c(body) != int.from_bytes(data[expected:], "little"):
            raise self._damaged(file, "it does not match its checksum")
        return np.frombuffer(body, self.dtype).reshape(self.chunks)

    def damage(self, what: str) -> StoreError:
        """The error for contents that cannot be right although the checksums fit."""
        return self._damaged(DOCUMENT, what)

    def _damaged_file(self, file: str, what: str) -> StoreError:
        return CorruptShardError(
            f"{self._storage.at(f'{self._path}/{file}')} is damaged ({what}): restore it from a copy, or build the cache again"
        )


def _chunk_key(grid: tuple[int, ...]) -> str:
    return "/".join(("c", *map(str, grid)))
