"""The list of a cache's images, as columns. Stored keys are slices of one long text, read on demand."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from threading import Lock
from typing import Any, final, overload

import numpy as np
from numpy.typing import NDArray

from radio_cache.arrays.plain import PlainArray, stored_bytes
from radio_cache.format.checksums import crc32c
from radio_cache.format.documents import INDEX_DTYPES
from radio_cache.format.schema import IMAGES_UNIT
from radio_cache.storage.base import Storage

# A chunk holds 2^20 elements: 8 MiB of `key_ends` or 1 MiB of `key_bytes`.
_KEPT_CHUNKS = 4
# Damaged or hostile ends could otherwise claim a key of gigabytes.
_MAX_KEY_BYTES = 1 << 16


def refuse_unfounded(storage: Storage, group: str, num_images: int) -> None:
    """Raise CorruptShardError unless the cache lists as many images as it declares, before memory is allocated for them."""
    column = PlainArray(storage, f"{group}/key_ends")
    column.expect((num_images,), INDEX_DTYPES["key_ends"]).refuse_unfounded()


@final
class ImageIndex:
    """Keys, labels and places of a cache's images, in row order. Stored columns are read when they are first used.

    keys: unique, one per image. labels (n,) int32, -1 without a label. container (n,): number in `CacheMeta.containers`.
    offset, length (n,): bytes within a tar; -1 for a file of its own.
    """

    def __init__(
        self,
        keys: Sequence[str],
        labels: NDArray[np.int32],
        container: NDArray[np.int32],
        offset: NDArray[np.int64],
        length: NDArray[np.int64],
    ) -> None:
        columns = {"label": labels, "container": container, "offset": offset, "length": length}
        self.keys: Sequence[str] = list(keys)
        self._column: Callable[[str], NDArray[Any]] = columns.__getitem__

    @classmethod
    def stored(cls, storage: Storage, group: str, num_images: int) -> "ImageIndex":
        """Return the index in a group of a cache."""
        none = np.zeros(0, np.int32)
        index = cls([], none, none, none.astype(np.int64), none.astype(np.int64))
        index.keys = StoredKeys(storage, group, num_images)
        holes = _may_have_holes(group)

        def column(name: str) -> NDArray[Any]:
            # `expect` compares the shape before memory is allocated for the column.
            array = PlainArray(storage, f"{group}/{name}").expect((num_images,), INDEX_DTYPES[name])
            return array.read(holes=holes)

        index._column = column
        return index

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, row: int) -> str:
        """Return the key of one image."""
        return self.keys[row]

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        return self._column("label")

    @cached_property
    def container(self) -> NDArray[np.int32]:
        return self._column("container")

    @cached_property
    def offset(self) -> NDArray[np.int64]:
        return self._column("offset")

    @cached_property
    def length(self) -> NDArray[np.int64]:
        return self._column("length")


@final
class StoredKeys(Sequence[str]):
    """Keys in a cache: slices of `key_bytes` that end at `key_ends`. A few chunks of both are kept in memory."""

    def __init__(self, storage: Storage, group: str, num_images: int) -> None:
        self._storage, self._group, self._num_images = storage, group, num_images
        self._kept: OrderedDict[tuple[str, int], NDArray[Any]] = OrderedDict()
        self._lock = Lock()

    @cached_property
    def _ends(self) -> PlainArray:
        column = PlainArray(self._storage, f"{self._group}/key_ends")
        return column.expect((self._num_images,), INDEX_DTYPES["key_ends"])

    @cached_property
    def _text(self) -> PlainArray:
        column = PlainArray(self._storage, f"{self._group}/key_bytes")
        return column.expect((math.prod(column.shape),), "uint8")

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys together."""
        return self._end(self._num_images - 1)

    def __len__(self) -> int:
        return self._num_images

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(self._num_images))]
        row = int(index) + (self._num_images if index < 0 else 0)
        if not 0 <= row < self._num_images:
            raise IndexError(f"row {index} of {self._num_images} images")
        return self._between(self._end(row - 1) if row else 0, self._end(row))

    def __iter__(self) -> Iterator[str]:
        # Chunk by chunk: `self[row]` would take the lock and look up two ends for every key.
        start = 0
        for first in range(0, self._num_images, self._ends.chunks[0]):
            chunk = self._chunk("ends", self._ends, first // self._ends.chunks[0])
            # Chunks are stored in full size, so the last one is cut at the number of images.
            for end in chunk[: self._num_images - first].tolist():
                yield self._between(start, end)
                start = end

    def __contains__(self, key: object) -> bool:
        return any(key == stored_key for stored_key in self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def _end(self, row: int) -> int:
        chunk, number = divmod(row, self._ends.chunks[0])
        return int(self._chunk("ends", self._ends, chunk)[number])

    def _between(self, start: int, end: int) -> str:
        # The ends come from a file, and unordered ones would cut keys out of the wrong places.
        if not 0 <= start <= end <= self._text.shape[0] or end - start > _MAX_KEY_BYTES:
            raise self._ends.damage("the places of keys are out of order")
        side = self._text.chunks[0]
        # A key may cross the border of a chunk. An empty key stays in the chunk where it starts.
        first, last = start // side, max(start, end - 1) // side
        if first == last:  # the usual case
            return _decoded(self._chunk("text", self._text, first)[start - first * side : end - first * side])
        parts = np.concatenate([self._chunk("text", self._text, number) for number in range(first, last + 1)])
        return _decoded(parts[start - first * side : end - first * side])

    def _chunk(self, name: str, array: PlainArray, number: int) -> NDArray[Any]:
        with self._lock:
            cached_chunk = self._kept.get((name, number))
            if cached_chunk is not None:
                self._kept.move_to_end((name, number))
                return cached_chunk
        # Outside the lock, so that a slow disk does not stop other threads. Two may read the same chunk, which is harmless.
        chunk = array.chunk((number,), holes=_may_have_holes(self._group))
        with self._lock:
            self._kept[name, number] = chunk
            while len(self._kept) > _KEPT_CHUNKS:
                self._kept.popitem(last=False)
        return chunk

    def __reduce__(self) -> tuple[type["StoredKeys"], tuple[Storage, str, int]]:
        return (StoredKeys, (self._storage, self._group, self._num_images))


def _may_have_holes(group: str) -> bool:
    """Return whether chunks of zeros may be missing: the first caches kept the index in `images`, written by zarr-python."""
    return group == IMAGES_UNIT


def index_columns(index: ImageIndex) -> dict[str, NDArray[Any]]:
    """Return an index as it is stored."""
    key_bytes, key_ends = encoded_keys(index.keys)
    return {
        "key_bytes": key_bytes,
        "key_ends": key_ends,
        "label": np.asarray(index.labels, np.int32),
        "container": np.asarray(index.container, np.int32),
        "offset": np.asarray(index.offset, np.int64),
        "length": np.asarray(index.length, np.int64),
    }


def index_group(columns: Mapping[str, NDArray[Any]]) -> str:
    """Named by its contents: two processes that write different lists never write the same file."""
    # `index_columns` fixes the order of the columns, so equal lists have equal names.
    together = b"".join(crc32c(stored_bytes(column)).to_bytes(4, "little") for column in columns.values())
    return f"{IMAGES_UNIT}/index-{crc32c(together):08x}"


def encoded_keys(keys: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    """Return the text of all keys and where each ends in it: variable-length strings are not yet part of the Zarr v3 standard."""
    # File names are bytes in any encoding; surrogateescape keeps those that are not UTF-8.
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    ends = np.cumsum(np.fromiter((len(key) for key in encoded), np.uint64, len(encoded)), dtype=np.uint64)
    return np.frombuffer(b"".join(encoded), np.uint8), ends


def _decoded(text: NDArray[np.uint8]) -> str:
    return text.tobytes().decode("utf-8", "surrogateescape")
