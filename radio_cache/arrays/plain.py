"""Arrays of a cache without shards: uncompressed chunks, each followed by its crc32c. Read without a Zarr library."""

import math
from collections.abc import Callable, Mapping
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import CorruptShardError, LimitError, StoreError
from radio_cache.format.checksums import CRC_BYTES, crc32c
from radio_cache.format.strict_json import parse_json
from radio_cache.format.zarr_json import DOCUMENT, MAX_DOCUMENT_BYTES, array_difference, shape_of
from radio_cache.storage.base import Storage

MAX_CHUNK_BYTES = 1 << 31
MAX_CHUNKS = 1 << 24
"""Limits of plausible arrays. A document can declare any numbers, and memory is allocated by them."""

_NO_NEED_TO_LOOK = 1 << 22
"""Arrays of up to this many bytes are allocated without comparing the stored files first."""

# Zarr's name of a type -> the type, little-endian on any machine. Types of objects cannot be declared.
_DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "float32",
        "float64",
    )
}
_CODECS = (["bytes"], ["bytes", "crc32c"])

Damaged = Callable[[str, str], StoreError]
"""Makes the error for a damaged file: its path below the array, and what is wrong with it."""


@final
class PlainArray:
    """One open array. Missing chunks hold the fill value. Safe to share between threads.

    Args:
        storage: of the cache.
        path: of the array, below the cache.
        document: its expected document; any difference is damage. None accepts any array.
        grows_along: axis along which the stored array may be longer, because a growing cache enlarges its arrays first.

    Raises:
        StoreError: if there is no array at `path`, or one that this library did not write.
        LimitError: if its chunks are implausibly large.
    """

    def __init__(
        self,
        storage: Storage,
        path: str,
        *,
        document: bytes | None = None,
        grows_along: int | None = None,
        damaged: Damaged | None = None,
    ) -> None:
        self._storage, self._path = storage, path
        self._damaged = damaged or self._damaged_file
        place = storage.at(f"{path}/{DOCUMENT}")
        try:
            stored_document = storage.read_at_most(f"{path}/{DOCUMENT}", MAX_DOCUMENT_BYTES)
        except FileNotFoundError as exc:
            raise self._damaged(DOCUMENT, "it is gone") from exc
        difference = document and array_difference(stored_document, document, grows_along=grows_along)
        if difference:
            raise self._damaged(DOCUMENT, f"it {difference}")
        # From here on the expected document counts: the stored array of a growing cache may already be longer.
        document = document or stored_document
        self.shape = shape_of(document, place)
        try:
            data = parse_json(document)
            codecs = [codec["name"] for codec in data["codecs"]]
            self.chunks = tuple(data["chunk_grid"]["configuration"]["chunk_shape"])
            self.dtype = _DTYPES[data["data_type"]]
            fill = data["fill_value"]
            self.fill_value = np.nan if fill == "NaN" else np.array(fill, self.dtype)[()]
            # Types of one byte have no byte order, and Zarr leaves it out.
            big = self.dtype.itemsize > 1 and data["codecs"][0].get("configuration", {}).get("endian") != "little"
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as exc:
            raise StoreError(f"{place} does not describe an array of a cache: {exc!r}") from exc
        # Not isinstance: True is an int, too.
        sides_fit = len(self.chunks) == len(self.shape) and all(type(side) is int and side > 0 for side in self.chunks)
        if codecs not in _CODECS or not sides_fit or big:
            raise StoreError(f"{place} does not describe an array of a cache: codecs {codecs}, chunks {self.chunks}")
        self._crc_bytes = CRC_BYTES if "crc32c" in codecs else 0
        if math.prod(self.chunks) * self.dtype.itemsize > MAX_CHUNK_BYTES:
            raise LimitError(
                f"{place} declares chunks of {self.chunks} {self.dtype}, more than {MAX_CHUNK_BYTES} bytes"
            )
        if math.prod(self.grid) > MAX_CHUNKS:
            raise LimitError(f"{place} declares {self.grid} chunks, more than {MAX_CHUNKS}")

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks along each axis."""
        # Rounded up: the last chunk along an axis may be partial.
        return tuple(-(-side // chunk) for side, chunk in zip(self.shape, self.chunks, strict=True))

    def expect(self, shape: tuple[int, ...], dtype: str) -> "PlainArray":
        """Itself. Raises the error of damage if it has another shape or type: nothing was allocated yet."""
        if self.shape != shape or self.dtype != _DTYPES[dtype]:
            what = f"it declares {self.shape} {self.dtype}, and the cache needs {shape} {dtype}"
            raise self._damaged(DOCUMENT, what)
        return self

    def refuse_unfounded(self) -> None:
        """Raise the error of damage if less is stored than is declared, before any memory is allocated for it.

        A document of a hundred bytes can declare terabytes. Small arrays pass.
        """
        declared = math.prod(self.shape) * self.dtype.itemsize
        if declared <= _NO_NEED_TO_LOOK:
            return
        stored = sum(size for _, size in self._storage.list_files(f"{self._path}/c"))
        if stored < declared:
            raise self._damaged(DOCUMENT, f"it declares {self.shape} {self.dtype}, and only {stored} bytes are stored")

    def read(self, *, holes: bool = True, vouched: Mapping[str, int] | None = None) -> NDArray[Any]:
        """Read the whole array.

        Args:
            holes: whether missing chunks hold the fill value; otherwise they are damage.
            vouched: path of a chunk below the array -> `checksums.file_crc32c` of its receipt. Missing or different chunks are
                damage, even if they are intact.
        """
        if not holes:
            self.refuse_unfounded()
        try:
            out = np.full(self.shape, self.fill_value, self.dtype) if holes else np.empty(self.shape, self.dtype)
        except (MemoryError, ValueError) as exc:
            raise LimitError(
                f"{self._storage.at(self._path)} declares {self.shape} {self.dtype}: more than this machine's memory holds"
            ) from exc
        for grid in np.ndindex(self.grid):
            file = _chunk_key(grid)
            known = (vouched or {}).get(file)
            # A chunk with a receipt has to exist, and to be the file that the receipt names.
            chunk = self.chunk(grid, holes=False) if known is not None or not holes else self.stored_chunk(grid)
            if chunk is None:
                continue
            # `file_crc32c` leaves out the closing checksum, so it equals the checksum of the values.
            if known is not None and crc32c(chunk.reshape(-1).view(np.uint8).data) != known:
                raise self._damaged(file, "it is another file than its receipt vouches for")
            places = tuple(
                slice(at * side, min((at + 1) * side, end))
                for at, side, end in zip(grid, self.chunks, self.shape, strict=True)
            )
            # Chunks are stored in full size, also beyond the end of the array.
            out[places] = chunk[tuple(slice(0, place.stop - place.start) for place in places)]
        return out

    def chunk(self, grid: tuple[int, ...], *, holes: bool = True) -> NDArray[Any]:
        """Read one chunk in its full shape, also at the array's end.

        Args:
            grid: chunk coordinates.
            holes: whether it may be missing.
        """
        stored = self.stored_chunk(grid)
        if stored is not None:
            return stored
        if not holes:
            raise self._damaged(_chunk_key(grid), "it is gone")
        return np.full(self.chunks, self.fill_value, self.dtype)

    def stored_chunk(self, grid: tuple[int, ...]) -> NDArray[Any] | None:
        """Read one chunk in its full shape, or return None if it is not stored. Raises the error of `damage`."""
        file = _chunk_key(grid)
        expected = math.prod(self.chunks) * self.dtype.itemsize
        try:
            # Never more than the expected bytes are read. A file of another size is refused below.
            data, size = self._storage.read_tail(f"{self._path}/{file}", expected + self._crc_bytes)
        except FileNotFoundError:
            return None
        if size != expected + self._crc_bytes:
            raise self._damaged(file, f"it has {size} bytes instead of {expected + self._crc_bytes}")
        body = memoryview(data)[:expected]
        if self._crc_bytes and crc32c(body) != int.from_bytes(data[expected:], "little"):
            raise self._damaged(file, "it does not match its checksum")
        return np.frombuffer(body, self.dtype).reshape(self.chunks)

    def damage(self, what: str) -> StoreError:
        """Return the error for contents that are wrong although the checksums match."""
        return self._damaged(DOCUMENT, what)

    def _damaged_file(self, file: str, what: str) -> StoreError:
        return CorruptShardError(
            f"{self._storage.at(f'{self._path}/{file}')} is damaged ({what}): restore it from a copy, or build the cache again"
        )


def stored_bytes(array: NDArray[Any]) -> bytes:
    """Little-endian, in C order, on any machine."""
    return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _chunk_key(grid: tuple[int, ...]) -> str:
    return "/".join(("c", *map(str, grid)))
