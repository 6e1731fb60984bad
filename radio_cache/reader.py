"""Reading a cache: which rows are there, their summaries, maps, labels and pixels.

Arrays are standard Zarr v3; the hot path reads the shard's index once, then one byte range per image straight into the
caller's buffer, and checks every chunk's crc32c. Nothing here needs torch.
"""

import contextlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radio_cache.codecs import Codec, codec_from_json, refuse_unknown
from radio_cache.crops import valid_hw
from radio_cache.errors import (
    CorruptShardError,
    ImageError,
    MissingRowsError,
    NotACacheError,
    ShapeError,
    StoreError,
    UnsupportedFormatError,
)
from radio_cache.fidelity import Fidelity, combined
from radio_cache.image_index import ImageIndex
from radio_cache.plain_arrays import PlainArray
from radio_cache.receipts import ReceiptColumns, UnitReceipts, finished_rows, read_receipt
from radio_cache.schema import (
    ATTRIBUTES_KEY,
    FORMAT_VERSION,
    IMAGES_UNIT,
    TRANSFORM,
    CacheMeta,
    Failure,
    Receipt,
    TeacherSpec,
    unit_group,
)
from radio_cache.shard_reader import ShardLayout, ShardReader, Verify
from radio_cache.storage import Storage, open_storage
from radio_cache.zarr_documents import DOCUMENT, array_difference, attributes_of, sharded_array_document

Rows = NDArray[np.int64] | Sequence[int] | range


class Cache:
    """An open cache. Cheap to open, safe to share between threads, safe to fork and to pickle.

    place: a path, or a URL such as s3://bucket/cache.zarr (docs/cloud.md).
    Raises NotACacheError or UnsupportedFormatError when there is none at `place`, LimitError if it declares impossible sizes.
    """

    def __init__(self, place: str | Path | Storage) -> None:
        self.storage = open_storage(place)
        attributes = _attributes(self.storage)
        if "format_version" not in attributes:
            raise NotACacheError(f"{self.url} is a part of a radio-cache store: open the store it belongs to")
        try:
            self.meta = CacheMeta.from_json(attributes)
        except (KeyError, TypeError, AttributeError) as exc:
            raise NotACacheError(f"{self.url} has attributes that are not those of format version 1: {exc}") from exc
        self.teachers: dict[str, CachedTeacher] = {}
        for name in self.storage.list_folders("teachers"):
            with contextlib.suppress(_NoGroupError):  # a teacher being dropped, or none
                self.teachers[name] = CachedTeacher(self, name)

    def __reduce__(self) -> tuple[type["Cache"], tuple[Storage]]:
        return (Cache, (self.storage,))

    @property
    def url(self) -> str:
        """Where the cache lies, as the user typed it."""
        return self.storage.url

    @property
    def path(self) -> Path:
        """The folder of a cache on a local disk."""
        return self.storage.local_path()

    @property
    def num_images(self) -> int:
        return self.meta.num_images

    @cached_property
    def index(self) -> ImageIndex:
        """Keys, labels and places of all images, in row order."""
        return ImageIndex.stored(self.storage, self.meta.index, self.num_images)

    @cached_property
    def sizes_hw(self) -> NDArray[np.int32]:
        """(n, 2) height and width of every image in pixels, upright; 0 where the image is unusable or not seen yet."""
        sizes = self._column("size_hw")
        lost = self.usable_rows()
        lost = lost[(sizes[lost] == 0).any(axis=1)]
        if len(lost):
            shard = int(lost[0]) // self.meta.shard_images
            raise _damaged(self.storage, IMAGES_UNIT, f"size_hw/c/{shard}/0", shard)
        return sizes

    @cached_property
    def digests(self) -> NDArray[np.uint8]:
        """(n, 16) BLAKE2b-128 of every image file's bytes; 0 where not seen yet."""
        return self._column("digest")

    def receipts(self, unit: str) -> list[Receipt | None]:
        """The receipts of a unit ("images" or a teacher) by shard; None where the shard has not been made."""
        found: list[Receipt | None] = [None] * self.meta.num_shards
        for receipt in UnitReceipts(self.storage, unit).all():
            if receipt.shard < len(found):
                found[receipt.shard] = receipt
        return found

    def receipt_columns(self, unit: str) -> ReceiptColumns:
        """What the receipts of a unit say, all together; the way for caches of millions of images."""
        return UnitReceipts(self.storage, unit).columns()

    def failures(self) -> list[Failure]:
        """The images that cannot be used, and why, as far as the build has come."""
        return [failure for receipt in self.receipts(IMAGES_UNIT) if receipt for failure in receipt.failures]

    def usable_rows(self, teachers: Iterable[str] = ()) -> NDArray[np.int64]:
        """Rows whose image is fine and whose shards are there for every teacher named, in order."""
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
        index = self.index
        container = self.meta.containers[index.container[row]]
        data = read_image_file(
            Path(container.path), index.key(row).removeprefix(container.prefix),
            int(index.offset[row]), int(index.length[row]),
        )  # fmt: skip
        if digest(data) != self.digests[row].tobytes():
            raise ImageError(f"{index.key(row)} has changed since the cache was built: build the cache again")
        return data

    def _column(self, name: str) -> NDArray[Any]:
        return _read_array(self.storage, IMAGES_UNIT, name, length=self.num_images)


class CachedTeacher:
    """One teacher's features in a cache. Get it from `Cache.teachers`."""

    def __init__(self, cache: Cache, name: str) -> None:
        self._cache = cache
        self._group = unit_group(name)
        self.name = name
        self.spec = TeacherSpec.from_json(_attributes(cache.storage, self._group))
        refuse_unknown(self.spec.codec)

    def __reduce__(self) -> tuple[type["CachedTeacher"], tuple[Cache, str]]:
        return (CachedTeacher, (self._cache, self.name))

    @cached_property
    def _shards(self) -> ShardReader:
        cache, codec = self._cache, self.codec
        storage, folder, shape = cache.storage, f"{self._group}/spatial", self.row_shape
        expected = sharded_array_document(
            (self.spec.views, cache.num_images, *shape), (1, cache.meta.shard_images, *shape), (1, 1, *shape),
            codec.dtype, codec.fill_value, codec.zstd_level,
        )  # fmt: skip
        try:
            difference = array_difference(storage.read(f"{folder}/{DOCUMENT}"), expected, grows_along=1)
        except FileNotFoundError:
            difference = "is gone"
        if difference:
            raise CorruptShardError(
                f"{storage.at(folder)}/{DOCUMENT} {difference}: radio-cache repair {cache.url}, then run the build again"
            )
        row_bytes = math.prod(shape) * codec.dtype.itemsize
        layout = ShardLayout(
            row_axes=len(shape), row_bytes=row_bytes, shard_images=cache.meta.shard_images,
            zstd=codec.zstd_level is not None,
        )  # fmt: skip
        return ShardReader(storage, folder, layout)

    @cached_property
    def codec(self) -> Codec:
        """What the stored codes mean."""
        storage, folder = self._cache.storage, f"{self._group}/{TRANSFORM}"
        names = storage.list_folders(folder)
        arrays = {name: _read_array(storage, self.name, f"{TRANSFORM}/{name}") for name in names}
        try:
            codec = codec_from_json(self.spec.codec, arrays)
            codec.row_shape(self.spec.geometry.grid_hw, self.spec.spatial_dim)
        except UnsupportedFormatError:
            raise
        except StoreError as exc:
            raise StoreError(
                f"{storage.at(folder)} is damaged, and teacher '{self.name}' cannot be decoded without it ({exc}): "
                "restore it from a copy, or drop the teacher and build it again"
            ) from exc
        return codec

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Stored shape of one image's map."""
        return self.codec.row_shape(self.spec.geometry.grid_hw, self.spec.spatial_dim)

    def summaries(self, rows: Rows, *, view: int = 0) -> NDArray[np.float32]:
        """(len(rows), c) summaries of these rows. Raises MissingRowsError for rows that are not there."""
        if self.spec.summary_dim is None:
            raise StoreError(f"{self._cache.url}: teacher '{self.name}' has no summary, only maps")
        wanted = self._existing(rows)
        stored = self._summaries[view][wanted]
        if np.isnan(stored).any():
            holes = wanted[np.isnan(stored).any(axis=1)]
            raise self._missing(holes, f"summary/c/{view}/{holes[0] // self._cache.meta.shard_images}/0")
        return stored.astype(np.float32)

    def codes(
        self, rows: Rows, *, view: int = 0, out: NDArray[Any] | None = None, verify: Verify = "always", threads: int = 1
    ) -> NDArray[Any]:
        """(len(rows), *row_shape) stored codes of these rows' maps, in the codec's type; `codec.decode` gives features.

        out: a buffer to fill instead of a new array; C-contiguous, of that shape and type. After an error it holds anything.
        verify: compare checksums always, of each row the first time this process reads it, or never.
        threads: that share the batch, this one among them. An object store is asked by more of them, which wait.
        Raises MissingRowsError for rows that are not there, CorruptShardError for bytes that fail their checksum.
        """
        shape = (len(rows), *self.row_shape)
        if out is None:
            out = np.empty(shape, dtype=self.codec.dtype)
        if out.shape != shape or out.dtype != self.codec.dtype or not out.flags.c_contiguous:
            raise ShapeError(
                f"teacher '{self.name}': the buffer is {out.dtype} {out.shape}, needed is C-contiguous "
                f"{self.codec.dtype} {shape}"
            )
        if not 0 <= view < self.spec.views:
            raise ShapeError(f"teacher '{self.name}' has {self.spec.views} views, and view {view} was asked for")
        wanted = self._existing(rows)
        flat = out.reshape(len(rows), math.prod(shape[1:])).view(np.uint8)
        missing = self._shards.read(view, wanted, flat, verify=verify, threads=threads)
        if len(missing):
            holes = np.sort(wanted[missing])
            raise self._missing(holes, f"spatial/{self._shards.key(view, int(holes[0]))}")
        return out

    def maps(self, rows: Rows, *, view: int = 0) -> NDArray[np.float32]:
        """(len(rows), h, w, c) decoded features of these rows."""
        return self.codec.decode(self.codes(rows, view=view))

    def spatial_mean_std(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Per-channel mean and standard deviation of the maps, over every token that shows an image."""
        return self._mean_std("spatial", [receipt.num_tokens for receipt in self._done()])

    def summary_mean_std(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Per-channel mean and standard deviation of the summaries."""
        views = self.spec.views
        return self._mean_std("summary", [views * (r.num_rows - len(r.failures)) for r in self._done()])

    def fidelity(self) -> Fidelity | None:
        """What the stored maps kept, measured while building, over all finished shards; None where nothing was measured."""
        found = combined(receipt.fidelity for receipt in self._done() if receipt.fidelity)
        return found and replace(found, variance=float(np.square(self.spatial_mean_std()[1]).sum()))

    def stored_bytes(self) -> int:
        """Bytes on disk of the finished shards of this teacher."""
        return sum(file.num_bytes for receipt in self._done() for file in receipt.files)

    def valid_hw(self, row: int) -> tuple[int, int]:
        """Height and width in input pixels of the part of this teacher's input that shows the image."""
        h, w = self._cache.sizes_hw[row]
        return valid_hw((int(h), int(w)), self.spec.geometry)

    def _done(self) -> list[Receipt]:
        return [receipt for receipt in self._cache.receipts(self.name) if receipt]

    @cached_property
    def _summaries(self) -> NDArray[Any]:
        # A summary is a few kilobytes an image: 1.28 million of 1280 channels are 3.3 GB, and memory is the right place.
        return _read_array(self._cache.storage, self.name, "summary", length=self._cache.num_images, axis=1)

    def _mean_std(self, name: str, counts: list[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        shards = [receipt.shard for receipt in self._done()]
        if sum(counts) == 0:
            raise MissingRowsError(f"{self._cache.url}: teacher '{self.name}' has no finished shard yet: run the build")
        by_shard = _read_array(self._cache.storage, self.name, f"stats/{name}", length=self._cache.meta.num_shards)
        holes = [shard for shard in shards if np.isnan(by_shard[shard]).any()]
        if holes:
            raise _damaged(self._cache.storage, self.name, f"stats/{name}/c/{holes[0]}/0/0", holes[0])
        sums = by_shard[shards].sum(axis=0)
        mean = sums[0] / sum(counts)
        return mean, np.sqrt(np.maximum(sums[1] / sum(counts) - mean**2, 0.0))

    def _existing(self, rows: Rows) -> NDArray[np.int64]:
        wanted = np.asarray(rows, dtype=np.int64)
        outside = (wanted < 0) | (wanted >= self._cache.num_images)
        if outside.any():
            raise self._missing(wanted[outside])
        return wanted

    def _missing(self, rows: NDArray[np.int64], file: str | None = None) -> StoreError:
        """Why these rows are not there. file: the shard file of the first one, which a receipt may vouch for."""
        shard = int(rows[0]) // self._cache.meta.shard_images
        receipt = read_receipt(self._cache.storage, self.name, shard) if file else None
        if receipt and rows[0] not in [failure.row for failure in receipt.failures]:
            return _damaged(self._cache.storage, self.name, str(file), shard)
        listed = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        return MissingRowsError(
            f"{self._cache.url}: teacher '{self.name}' has nothing for row {listed}: the image is unusable or its "
            "shard is not built yet; ask `usable_rows`, or run the build again"
        )


def digest(data: bytes) -> bytes:
    """16 bytes that stand for an image file: BLAKE2b-128."""
    import hashlib

    return hashlib.blake2b(data, digest_size=16).digest()


def read_image_file(container: Path, member: str, offset: int, length: int) -> bytes:
    """The bytes of an image: a file below a folder (offset -1), or a byte range of a tar.

    Raises ImageError with the operating system's reason.
    """
    try:
        if offset < 0:
            return (container / member).read_bytes()
        with container.open("rb") as file:
            data = os.pread(file.fileno(), length, offset)
    except OSError as exc:
        raise ImageError(f"cannot be read: {exc.strerror or exc}") from exc
    if len(data) != length:
        raise ImageError(f"cannot be read: {container} ends inside it")
    return data


class _NoGroupError(NotACacheError):
    """There is no group of ours at a place."""


def is_cache(place: str | Path | Storage) -> bool:
    """Whether there is a radio-cache store at `place`, of any format version."""
    try:
        _attributes(open_storage(place))
    except NotACacheError:
        return False
    return True


def _read_array(storage: Storage, unit: str, name: str, *, length: int | None = None, axis: int = 0) -> NDArray[Any]:
    """A whole small array of a unit. Raises CorruptShardError naming the file and the cure.

    length: what it must have along `axis`, at least.
    """
    place = f"{unit_group(unit)}/{name}"

    def damaged(file: str, what: str) -> CorruptShardError:
        grid = [int(part) for part in file.split("/")[1:] if part.isdigit()]
        if name.startswith(TRANSFORM) or not grid or file == DOCUMENT:
            return CorruptShardError(f"{storage.at(f'{place}/{file}')} is damaged: {what}")
        return _damaged(storage, unit, f"{name}/{file}", grid[min(axis, len(grid) - 1)])

    array = PlainArray(storage, place, damaged=damaged)
    if length is not None and len(array.shape) > axis:
        array.expect((*array.shape[:axis], length, *array.shape[axis + 1 :]), grows=axis)
    return array.read()


def _damaged(storage: Storage, unit: str, file: str, shard: int) -> CorruptShardError:
    return CorruptShardError(
        f"{storage.at(f'{unit_group(unit)}/{file}')} (shard {shard}) is damaged or gone, although there is a receipt for it: "
        f"radio-cache repair {storage.url}, then run the build again"
    )


def _attributes(storage: Storage, group: str = "") -> dict[str, Any]:
    """Our attributes of a Zarr group, read as JSON: no library, no defaults."""
    place = storage.at(group)
    try:
        document = storage.read(f"{group}/{DOCUMENT}" if group else DOCUMENT)
    except NotADirectoryError as exc:
        raise NotACacheError(f"{place} is a file, not a radio-cache store, which is a folder") from exc
    except FileNotFoundError as exc:
        if storage.is_local and not storage.local_path(group).exists():
            raise _NoGroupError(f"{place} does not exist") from exc
        what = "is a folder, but not" if storage.is_local else "holds no"
        raise _NoGroupError(f"{place} {what} a radio-cache store: it has no {DOCUMENT}") from exc
    try:
        return dict(attributes_of(document)[ATTRIBUTES_KEY].items())
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as exc:
        raise NotACacheError(f"{place} is a Zarr group, but not a radio-cache store") from exc


__all__ = [
    "FORMAT_VERSION", "Cache", "CachedTeacher", "UnsupportedFormatError", "Verify", "digest", "is_cache",
    "read_image_file", "read_receipt",
]  # fmt: skip
