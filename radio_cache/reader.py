"""Reading a cache: which rows are there, their summaries, maps, labels and pixels.

Arrays are standard Zarr v3; the hot path reads the shard's index once, then one byte range per image straight into the
caller's buffer, and checks every chunk's crc32c. Nothing here needs torch.
"""

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from radio_cache.arrays.group import NoGroupError, group_attributes
from radio_cache.cache_files import CacheFiles
from radio_cache.cached_teacher import CachedTeacher, Teachers
from radio_cache.errors import (
    ConfigError,
    ImageError,
    LimitError,
    NotACacheError,
    StorageError,
    StoreError,
    UnsupportedFormatError,
)
from radio_cache.format.schema import IMAGES_UNIT, MAX_IMAGE_PIXELS, CacheMeta, Failure, Receipt
from radio_cache.format.zarr_json import DOCUMENT
from radio_cache.images.containers import read_image
from radio_cache.images.index import ImageIndex
from radio_cache.images.stored import StoredPixels
from radio_cache.receipts import ReceiptColumns, finished_rows
from radio_cache.storage import open_storage
from radio_cache.storage.base import Storage

if TYPE_CHECKING:
    import zarr
    from PIL import Image

MAX_PIXELS_VARIABLE = "RADIO_CACHE_MAX_PIXELS"
"""Of the environment: how many pixels an image of a cache may have, where its user trusts larger ones than usual."""

_ROWS_FOR_HOSTS = 10_000


class Cache:
    """An open cache. Cheap to open, safe to share between threads, safe to fork and to pickle.

    place: a path, or a URL such as s3://bucket/cache.zarr (docs/cloud.md).
    Raises NotACacheError or UnsupportedFormatError when there is none at `place`, LimitError if it declares impossible sizes.
    """

    def __init__(self, place: str | Path | Storage) -> None:
        self.storage = open_storage(place)
        attributes = group_attributes(self.storage)
        if "format_version" not in attributes:
            raise NotACacheError(f"{self.url} is a part of a radio-cache store: open the store it belongs to")
        self.files = CacheFiles(self.storage, CacheMeta.from_json(attributes, self.storage.at(DOCUMENT)))
        self.teachers = Teachers()
        for name in self.storage.list_folders("teachers"):
            try:
                self.teachers[name] = CachedTeacher(self.files, name)
            except NoGroupError:
                pass  # a teacher being dropped, or none
            except StoreError as exc:
                if isinstance(exc, StorageError) and not self.storage.is_local:
                    raise  # a bucket that does not answer says nothing about a teacher
                self.teachers.unreadable[name] = exc

    def __reduce__(self) -> tuple[type["Cache"], tuple[Storage]]:
        return (Cache, (self.storage,))

    def reopened(self) -> "Cache":
        """Return the same cache as it is stored now. An open cache keeps the documents and receipts that it has read."""
        return Cache(self.storage)

    @property
    def url(self) -> str:
        """Where the cache lies, as the user typed it."""
        return self.storage.url

    @property
    def path(self) -> Path:
        """The folder of a cache on a local disk."""
        return self.storage.local_path()

    @property
    def meta(self) -> CacheMeta:
        """The root document."""
        return self.files.meta

    @property
    def num_images(self) -> int:
        return self.meta.num_images

    @property
    def sizes_hw(self) -> NDArray[np.int32]:
        """(n, 2) height and width of every image in pixels, upright; 0 where the image is unusable or not seen yet."""
        return self.files.sizes_hw

    def receipts(self, unit: str) -> list[Receipt | None]:
        """The receipts of a unit ("images" or a teacher) by shard; None where the shard has not been made."""
        return self.files.receipts(unit)

    def receipt_columns(self, unit: str) -> ReceiptColumns:
        """What the receipts of a unit say, all together; the way for caches of millions of images."""
        return self.files.receipt_columns(unit)

    def refuse_unfounded(self) -> None:
        """Raise CorruptShardError if the cache says it has more images than it lists."""
        self.files.refuse_unfounded()

    def zarr_group(self) -> "zarr.Group":
        """Open the cache with zarr-python, for tools that take its arrays: here, or in a bucket with the same credentials.

        A missing shard reads as fill values there, without a word; `usable_rows` says which rows count.
        """
        import zarr

        return zarr.open_group(self.storage.zarr_store(), mode="r", zarr_format=3)

    @cached_property
    def index(self) -> ImageIndex:
        """Keys, labels and places of all images, in row order."""
        return ImageIndex.stored(self.storage, self.meta.index, self.num_images)

    @cached_property
    def statuses(self) -> NDArray[np.uint8]:
        """(n,) `ImageStatus` of every image."""
        return self.files.column("status")

    @cached_property
    def digests(self) -> NDArray[np.uint8]:
        """(n, 16) BLAKE2b-128 of every image file's bytes; 0 where not seen yet."""
        return self.files.column("digest")

    def failures(self) -> list[Failure]:
        """The images that cannot be used, and why, as far as the build has come."""
        return [failure for receipt in self.receipts(IMAGES_UNIT) if receipt for failure in receipt.failures]

    def usable_rows(self, teachers: Iterable[str] = ()) -> NDArray[np.int64]:
        """Rows whose image is fine and whose shards are there for every teacher named, in order."""
        self.refuse_unfounded()
        usable = np.ones(self.num_images, np.bool_)
        for unit in (IMAGES_UNIT, *teachers):
            columns = self.receipt_columns(unit)
            finished_rows(columns, self.num_images, self.meta.shard_images, usable)
            usable[columns.failed_rows[columns.failed_rows < self.num_images]] = False
        return np.flatnonzero(usable)

    def read_file(self, row: int) -> bytes:
        """The bytes of an image file, from where the build found it.

        Raises ImageError if it is gone, or is no longer the file that the teachers saw.
        """
        data = self.read_unchecked(row)
        if digest(data) != self.digests[row].tobytes():
            raise ImageError(f"{self.index.key(row)} has changed since the cache was built: build the cache again")
        return data

    def read_pixels(self, row: int) -> bytes:
        """An image file to train on: the one the cache keeps, smaller and encoded again, or else `read_file`.

        It is upright where the original needed turning. Raises ImageError, and CorruptShardError for a damaged shard.
        """
        return self.read_file(row) if self.pixels is None else self.pixels.file(row)

    def read_original_or_kept(self, row: int) -> tuple[bytes, bool]:
        """An image file to look at: `read_file`, or, where that is gone or changed, the one the cache keeps; and whether kept.

        Raises as `read_pixels` does.
        """
        try:
            return self.read_file(row), False
        except ImageError:
            if self.pixels is None:
                raise
            return self.pixels.file(row), True

    def decode(self, data: bytes, *, least_px: int | None = None) -> "Image.Image":
        """Decode an image of this cache, of at most as many pixels as the cache states and this reader takes of any cache.

        least_px: as of `decode_image`. Raises ImageError as that does.
        """
        from radio_cache.images.decode import decode_image

        own = max_pixels_of_any_cache()
        try:
            return decode_image(data, max_pixels=min(self.meta.max_pixels, own), least_px=least_px)
        except ImageError as exc:
            if self.meta.max_pixels <= own or "--max-pixels" not in str(exc):
                raise
            raise ImageError(
                f"{str(exc).partition('; raise')[0]}, which is as many as an image of any cache may have; this one states "
                f"{self.meta.max_pixels}: set {MAX_PIXELS_VARIABLE}={self.meta.max_pixels} if you trust it"
            ) from exc

    def refuse_large_images(self) -> None:
        """Raise LimitError if the cache states that its images may be larger than those of any cache."""
        own = max_pixels_of_any_cache()
        if self.meta.max_pixels > own:
            raise LimitError(
                f"{self.url} states that an image may have {self.meta.max_pixels} pixels, and {own} are usual: set "
                f"{MAX_PIXELS_VARIABLE}={self.meta.max_pixels} if you trust it"
            )

    def remote_images_note(self) -> str:
        """Return a sentence that names the web servers which reading the images asks, for a command to say; "" if there are none.

        Of a list of files about 10,000 are looked at.
        """
        places = [container.path for container in self.meta.containers]
        lists = [number for number, container in enumerate(self.meta.containers) if container.kind == "list"]
        if lists and self.num_images:
            rows = np.flatnonzero(np.isin(self.index.container, lists))
            chosen = rows[:: max(1, len(rows) // _ROWS_FOR_HOSTS)].tolist()
            places += [
                self.index.key(row).removeprefix(self.meta.containers[int(self.index.container[row])].prefix)
                for row in chosen
            ]
        hosts = sorted(
            {place.split("/", 3)[2] for place in places if place.lower().startswith(("http://", "https://"))}
        )
        if not hosts or self.meta.pixels is not None:
            return ""
        more = f" and {len(hosts) - 5} more" if len(hosts) > 5 else ""
        named = ", ".join(repr(host.rpartition("@")[2])[1:-1][:100] for host in hosts[:5])
        return f"images of {self.url} are read from the web, where the cache says: {named}{more}"

    @cached_property
    def pixels(self) -> StoredPixels | None:
        """The images that the cache keeps; None where it does not."""
        return None if self.meta.pixels is None else StoredPixels(self.storage, self.meta.shard_images)

    def read_unchecked(self, row: int) -> bytes:
        """The bytes of an image file as they are now; for a build, which is about to note what they should be."""
        index, containers = self.index, self.meta.containers
        number, key = int(index.container[row]), index.key(row)
        if not 0 <= number < len(containers):
            raise ImageError(f"cannot be read: {self.url} says that it lies in place {number} of {len(containers)}")
        try:
            return read_image(containers[number], key, int(index.offset[row]), int(index.length[row]))
        except UnsupportedFormatError as exc:
            raise UnsupportedFormatError(f"{self.storage.at(DOCUMENT)}: {exc}") from exc


def max_pixels_of_any_cache() -> int:
    """Return how many pixels an image is decoded with, whatever the cache that it comes from states.

    Raises ConfigError if the environment says something else than a number.
    """
    from radio_cache.images.decode import MAX_PIXELS

    text = os.environ.get(MAX_PIXELS_VARIABLE, str(MAX_PIXELS))
    if not text.isdecimal() or not 0 < int(text) <= MAX_IMAGE_PIXELS:
        raise ConfigError(f"{MAX_PIXELS_VARIABLE}={text} is no number of pixels between 1 and {MAX_IMAGE_PIXELS}")
    return int(text)


def digest(data: bytes) -> bytes:
    """16 bytes that stand for an image file: BLAKE2b-128."""
    import hashlib

    return hashlib.blake2b(data, digest_size=16).digest()


def is_cache(place: str | Path | Storage) -> bool:
    """Return whether there is a radio-cache store at `place`, of any format version."""
    try:
        group_attributes(open_storage(place))
    except NotACacheError:
        return False
    return True


__all__ = ["Cache", "CachedTeacher", "digest", "is_cache"]
