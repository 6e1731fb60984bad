"""The images themselves, kept in the cache: re-encoded once, the shorter side bounded, so that training needs no other file.

They lie in `images/pixels`, one image a chunk of one shard file, in Zarr's variable-length bytes: any Zarr library that knows
those hands out image files. A chunk is the number of its elements (1), the length of the file, the file, and a crc32c.
"""

import io
import struct
from collections import OrderedDict
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from radio_cache.errors import CorruptShardError, ImageError
from radio_cache.format.checksums import CRC_BYTES, crc32c
from radio_cache.format.pixels import PixelFormat, PixelStore
from radio_cache.shards.encoding import ABSENT, LABEL_BYTES, decode_index, index_bytes, is_mislabelled
from radio_cache.storage.base import Storage

FOLDER = "images/pixels"
"""Of the array, below the cache."""


# Longest sides that libjpeg and WebP can encode.
_LONGEST_PX: dict[PixelFormat, int] = {"jpeg": 65_500, "webp-lossless": 16_383}
# Number of elements, always 1, and bytes of the file.
_HEAD = struct.Struct("<II")
# 16 bytes for each image: 2 KiB for a shard of 128.
_KEPT_INDEXES = 4096
_CURE = "radio-cache repair, then run the build again"


def encoded_pixels(image: Image.Image, original: bytes, store: PixelStore) -> bytes:
    """Return the file that is kept of an upright RGB image: the original, where that is small enough and no longer."""
    scale = store.side_px / min(image.size)
    resized = image
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        resized = image.resize(size, Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    if max(resized.size) > _LONGEST_PX[store.format]:
        resized.save(encoded, "PNG")  # long strips exceed the limits of the format
    elif store.format == "jpeg":
        resized.save(encoded, "JPEG", quality=store.quality, subsampling=0)
    else:
        resized.save(encoded, "WEBP", lossless=True, method=4)
    # Encoding again would lose quality, and save nothing if the original is no longer.
    return original if scale >= 1 and len(original) <= encoded.tell() else encoded.getvalue()


def chunk_of(file: bytes) -> NDArray[np.uint8]:
    """Return an image file as the chunk that is stored, without its checksum."""
    return np.frombuffer(_HEAD.pack(1, len(file)) + file, np.uint8)


class StoredPixels:
    """Reads image files out of a cache. Safe to share between threads and to pickle."""

    def __init__(self, storage: Storage, shard_images: int) -> None:
        self._storage, self._shard_images = storage, shard_images
        self._lock = Lock()
        self._indexes: OrderedDict[int, NDArray[np.uint64]] = OrderedDict()

    def __reduce__(self) -> tuple[type["StoredPixels"], tuple[Storage, int]]:
        return (StoredPixels, (self._storage, self._shard_images))

    def file(self, row: int) -> bytes:
        """Return the image file of a row. Raises ImageError where none is kept, CorruptShardError for what is damaged."""
        shard, number = divmod(row, self._shard_images)
        path = f"{FOLDER}/c/{shard}"
        place = f"{self._storage.at(path)}: row {row}"
        # A repair may have replaced the shard since its index was read: the second attempt reads the index again.
        for attempt in range(2):
            offset, length = (int(value) for value in self._index(shard, path, anew=attempt > 0)[number])
            if offset == int(ABSENT):
                raise ImageError(f"its pixels are not kept: {place} is a hole: the image is unusable, or not built yet")
            chunk = bytes(self._storage.read_ranges(path, [(offset, length)])[0])
            body, crc = chunk[:-CRC_BYTES], int.from_bytes(chunk[-CRC_BYTES:], "little")
            if len(chunk) == length > _HEAD.size + CRC_BYTES and crc32c(body) == crc:
                count, size = _HEAD.unpack_from(body)
                if (count, size) == (1, len(body) - _HEAD.size):
                    return body[_HEAD.size :]
        raise CorruptShardError(f"{place} does not match its checksum: {_CURE}")

    def _index(self, shard: int, path: str, *, anew: bool) -> NDArray[np.uint64]:
        with self._lock:
            known = self._indexes.get(shard)
        if known is not None and not anew:
            return known
        length = index_bytes(self._shard_images)
        try:
            tail, size = self._storage.read_tail(path, LABEL_BYTES + length)
        except FileNotFoundError as exc:
            raise ImageError(f"its pixels are not kept: {self._storage.at(path)} is not there: {_CURE}") from exc
        if size < length or is_mislabelled(tail[:-length], path):
            raise CorruptShardError(f"{self._storage.at(path)} is another shard's file, or cut short: {_CURE}")
        try:
            index = decode_index(tail[-length:], self._storage.at(path))
        except CorruptShardError as exc:
            raise CorruptShardError(f"{exc}: {_CURE}") from exc
        # Compared one by one: the sum of two unsigned 64-bit numbers could overflow.
        inside = (index[:, 0] <= size) & (index[:, 1] <= size)
        if not (inside | (index == ABSENT).all(axis=1)).all():
            raise CorruptShardError(f"{self._storage.at(path)}: its index places a chunk outside the file: {_CURE}")
        with self._lock:
            self._indexes[shard] = index
            while len(self._indexes) > _KEPT_INDEXES:
                self._indexes.popitem(last=False)
        return index
