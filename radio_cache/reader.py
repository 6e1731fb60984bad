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

from radio_cache.arrays.group import NoGroupError, read_group_attributes
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
"""Environment variable for the largest number of pixels of an image, for users who trust a cache with larger ones than usual."""

_ROWS_FOR_HOSTS = 10_000


class Cache:
    """An open cache. Cheap to open, safe to share between threads, safe to fork and to pickle.

    place: a path, or a URL such as s3://bucket/cache.zarr (docs/cloud.md).
    Raises NotACacheError or UnsupportedFormatError when there is none at `place`, LimitError if it declares impossible sizes.
    """

    def __init__(self, place: str | Path | Storage) -> None:
        self.storage = open_storage(place)
        attributes = read_group_attributes(self.storage)
        # Groups of teachers have attributes of ours, too, but no version.
        if "format_version" not in attributes:
            raise NotACacheError(f"{self.url} is a part of a radio-cache store: open the store it belongs to")
        self.files = CacheFiles(self.storage, CacheMeta.from_json(attributes, self.storage.at(DOCUMENT)))
        self.teachers = Teachers()
        for name in self.storage.list_folders("teachers"):
            try:
                self.teachers[name] = CachedTeacher(self.files, name)
            except NoGroupError:
                pass  # the folder of a teacher that is being dropped, or of no teacher
            except StoreError as exc:
                if isinstance(exc, StorageError) and not self.storage.is_local:
                    raise  # a bucket that does not answer reveals nothing about one teacher
                self.teachers.unreadable[name] = exc

    def __reduce__(self) -> tuple[type["Cache"], tuple[Storage]]:
        return (Cache, (self.storage,))

    def reopened(self) -> "Cache":
        """Return the same cache as it is stored now. An open cache keeps the documents and receipts that it has read."""
        return Cache(self.storage)

    @property
    def url(self) -> str:
        """Path or URL of the cache, as the user typed it."""
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
        """Return the receipts of a unit ("images" or a teacher) by shard, with None for unfinished shards."""
        return self.files.receipts(unit)

    def receipt_columns(self, unit: str) -> ReceiptColumns:
        """Return the common fields of a unit's receipts, fast enough for caches of millions of images."""
        return self.files.receipt_columns(unit)

    def refuse_unfounded(self) -> None:
        """Raise CorruptShardError if the cache declares more images than it lists."""
        self.files.refuse_unfounded()

    def zarr_group(self) -> "zarr.Group":
        """Open the cache with zarr-python, locally or in a bucket with the same credentials.

        zarr-python reads a missing shard as fill values, without an error. `usable_rows` returns the valid rows.
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
        """Return the unusable images with their reasons, as far as the build has progressed."""
        return [failure for receipt in self.receipts(IMAGES_UNIT) if receipt for failure in receipt.failures]

    def usable_rows(self, teachers: Iterable[str] = ()) -> NDArray[np.int64]:
        """Rows whose image is fine and whose shards are there for every teacher named, in order."""
        self.refuse_unfounded()
        usable = np.ones(self.num_images, np.bool_)
        for unit in (IMAGES_UNIT, *teachers):
            columns = self.receipt_columns(unit)
            finished_rows(columns, self.num_images, self.meta.shard_images, usable)
            # Receipts of a longer cache may name rows beyond the end.
            usable[columns.failed_rows[columns.failed_rows < self.num_images]] = False
        return np.flatnonzero(usable)

    def read_file(self, row: int) -> bytes:
        """Read the bytes of an image file from its recorded path.

        Raises:
            ImageError: if it is missing, or is not the file that the teachers saw.
        """
        data = self.read_unchecked(row)
        # Features of other bytes would not fit the pixels that the student sees.
        if digest(data) != self.digests[row].tobytes():
            raise ImageError(f"{self.index.key(row)} has changed since the cache was built: build the cache again")
        return data

    def read_pixels(self, row: int) -> bytes:
        """Read an image for training: the one stored in the cache, smaller and encoded again, or else `read_file`.

        Stored images are upright.

        Raises:
            ImageError: as `read_file`.
            CorruptShardError: for a damaged shard.
        """
        return self.read_file(row) if self.pixels is None else self.pixels.file(row)

    def read_original_or_kept(self, row: int) -> tuple[bytes, bool]:
        """Read an image for viewing: `read_file`, or the stored one if the file is missing or changed.

        Returns:
            The bytes, and whether they are the stored image.

        Raises:
            ImageError: as `read_pixels`.
            CorruptShardError: as `read_pixels`.
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

        limit = max_pixels_of_any_cache()
        try:
            # The smaller of both: a hostile cache may state any number.
            return decode_image(data, max_pixels=min(self.meta.max_pixels, limit), least_px=least_px)
        except ImageError as exc:
            if self.meta.max_pixels <= limit or "--max-pixels" not in str(exc):
                raise
            raise ImageError(
                f"{str(exc).partition('; raise')[0]}, which is as many as an image of any cache may have; this one states "
                f"{self.meta.max_pixels}: set {MAX_PIXELS_VARIABLE}={self.meta.max_pixels} if you trust it"
            ) from exc

    def refuse_large_images(self) -> None:
        """Raise LimitError if the cache states that its images may be larger than those of any cache."""
        limit = max_pixels_of_any_cache()
        if self.meta.max_pixels > limit:
            raise LimitError(
                f"{self.url} states that an image may have {self.meta.max_pixels} pixels, and {limit} are usual: set "
                f"{MAX_PIXELS_VARIABLE}={self.meta.max_pixels} if you trust it"
            )

    def remote_images_note(self) -> str:
        """Return a sentence that names the web servers from which images are read, or "" if there are none.

        For a list of files about 10,000 of them are checked.
        """
        # The path of a tar or a Parquet file names its server; the entries of a list name servers of their own.
        places = [container.path for container in self.meta.containers]
        lists = [number for number, container in enumerate(self.meta.containers) if container.kind == "list"]
        if lists and self.num_images:
            rows = np.flatnonzero(np.isin(self.index.container, lists))
            # A sample, spread over the list: each key is decoded on its own.
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
        # Without logins, and escaped: hosts come from an untrusted cache and go to a terminal.
        named = ", ".join(repr(host.rpartition("@")[2])[1:-1][:100] for host in hosts[:5])
        return f"images of {self.url} are read from the web, where the cache says: {named}{more}"

    @cached_property
    def pixels(self) -> StoredPixels | None:
        """The images that the cache keeps; None where it does not."""
        return None if self.meta.pixels is None else StoredPixels(self.storage, self.meta.shard_images)

    def read_unchecked(self, row: int) -> bytes:
        """Read the bytes of an image file without comparing its digest, for a build that is about to record it."""
        index, containers = self.index, self.meta.containers
        number, key = int(index.container[row]), index.key(row)
        # The number comes from the index, which may be damaged; a negative one would count from the end.
        if not 0 <= number < len(containers):
            raise ImageError(f"cannot be read: {self.url} says that it lies in place {number} of {len(containers)}")
        try:
            return read_image(containers[number], key, int(index.offset[row]), int(index.length[row]))
        # Names the document: the error itself knows only the image.
        except UnsupportedFormatError as exc:
            raise UnsupportedFormatError(f"{self.storage.at(DOCUMENT)}: {exc}") from exc


def max_pixels_of_any_cache() -> int:
    """Return the reader's limit of pixels of an image, which holds whatever a cache states.

    Raises:
        ConfigError: if the environment variable is not a number.
    """
    # Imported here, because only decoding needs PIL.
    from radio_cache.images.decode import MAX_PIXELS

    text = os.environ.get(MAX_PIXELS_VARIABLE, str(MAX_PIXELS))
    if not text.isdecimal() or not 0 < int(text) <= MAX_IMAGE_PIXELS:
        raise ConfigError(f"{MAX_PIXELS_VARIABLE}={text} is no number of pixels between 1 and {MAX_IMAGE_PIXELS}")
    return int(text)


def digest(data: bytes) -> bytes:
    """Return the digest of an image file: BLAKE2b-128, 16 bytes."""
    import hashlib

    return hashlib.blake2b(data, digest_size=16).digest()


def is_cache(place: str | Path | Storage) -> bool:
    """Return whether there is a radio-cache store at `place`, of any format version."""
    try:
        read_group_attributes(open_storage(place))
    except NotACacheError:
        return False
    return True


__all__ = ["Cache", "CachedTeacher", "digest", "is_cache"]
