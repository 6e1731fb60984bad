"""Reading a cache: which rows are there, their summaries, maps, labels and pixels.

Arrays are standard Zarr v3; the hot path reads the shard's index once, then one byte range per image straight into the
caller's buffer, and checks every chunk's crc32c. Nothing here needs torch.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from radio_cache.codecs import Codec, codec_from_json, refuse_unknown
from radio_cache.conversion import Conversion, conversion_of
from radio_cache.crops import valid_hw
from radio_cache.errors import (
    CorruptShardError,
    ImageError,
    MissingRowsError,
    NotACacheError,
    ShapeError,
    StorageError,
    StoreError,
    UnsupportedFormatError,
)
from radio_cache.extra_views import View, whole_view
from radio_cache.fidelity import Fidelity, after, combined
from radio_cache.image_files import read_image
from radio_cache.image_index import ImageIndex, refuse_unfounded
from radio_cache.known_shards import ShardLayout
from radio_cache.layout import (
    crop_document,
    flipped_document,
    images_documents,
    spatial_document,
    stats_document,
    stats_widths,
    summary_document,
)
from radio_cache.plain_arrays import PlainArray
from radio_cache.receipts import ReceiptColumns, UnitReceipts, finished_rows, read_receipt
from radio_cache.schema import (
    ARRAYS_CRC32C,
    ATTRIBUTES_KEY,
    FORMAT_VERSION,
    IMAGES_UNIT,
    MAX_ROW_BYTES,
    TRANSFORM,
    CacheMeta,
    Failure,
    Receipt,
    TeacherSpec,
    check_limit,
    unit_group,
)
from radio_cache.shard_batches import Verify
from radio_cache.shard_reader import ShardReader
from radio_cache.shards import crc32c
from radio_cache.storage import Storage, open_storage
from radio_cache.stored_pixels import StoredPixels
from radio_cache.strict_json import parse_json
from radio_cache.zarr_documents import DOCUMENT, MAX_DOCUMENT_BYTES, array_difference

Rows = NDArray[np.int64] | Sequence[int] | range

_NO_NEED_TO_LOOK = 1 << 20
"""Images for which there is memory on any machine."""

_BATCH_ROWS, _BATCH_BYTES = 32, 64 << 20


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
        self.meta = CacheMeta.from_json(attributes, self.storage.at(DOCUMENT))
        self.teachers = Teachers()
        for name in self.storage.list_folders("teachers"):
            try:
                self.teachers[name] = CachedTeacher(self, name)
            except _NoGroupError:
                pass  # a teacher being dropped, or none
            except StoreError as exc:
                if isinstance(exc, StorageError) and not self.storage.is_local:
                    raise  # a bucket that does not answer says nothing about a teacher
                self.teachers.unreadable[name] = exc

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
    def statuses(self) -> NDArray[np.uint8]:
        """(n,) `ImageStatus` of every image."""
        return self._column("status")

    @cached_property
    def sizes_hw(self) -> NDArray[np.int32]:
        """(n, 2) height and width of every image in pixels, upright; 0 where the image is unusable or not seen yet."""
        return self._column("size_hw")

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

    def refuse_unfounded(self) -> None:
        """Raise CorruptShardError if the cache says it has more images than it lists."""
        if not self._founded and self.num_images > _NO_NEED_TO_LOOK:
            refuse_unfounded(self.storage, self.meta.index, self.num_images)
            self._founded = True

    _founded = False

    def _column(self, name: str) -> NDArray[Any]:
        self.refuse_unfounded()
        document = dict(images_documents(self.meta))[f"{name}/{DOCUMENT}"]
        return _read_array(self.storage, IMAGES_UNIT, name, document, grows_along=0)


class Teachers(dict[str, "CachedTeacher"]):
    """Name -> teacher. unreadable: those that are there and cannot be used. To ask for one, also whether it is there, raises
    its error: it is neither a teacher nor none."""

    def __init__(self) -> None:
        super().__init__()
        self.unreadable: dict[str, StoreError] = {}

    def __contains__(self, name: object) -> bool:
        if name in self.unreadable:
            raise self.unreadable[str(name)]
        return super().__contains__(name)

    def names(self) -> tuple[str, ...]:
        """The teachers, each once, at however many input sizes it is kept."""
        return tuple(dict.fromkeys(teacher.spec.level_of or name for name, teacher in self.items()))

    def levels(self, name: str) -> tuple["CachedTeacher", ...]:
        """One teacher at all the input sizes it is kept at, from the smallest to the largest; most have one.

        Raises KeyError for a teacher that is not there, and the error of a level that cannot be used.
        """
        found = [teacher for teacher in self.values() if name in (teacher.name, teacher.spec.level_of)]
        for one, error in self.unreadable.items():
            if name in (one, one.partition("@")[0]):  # what would say whose level it is cannot be read
                raise error
        if not found:
            raise KeyError(name)
        return tuple(sorted(found, key=lambda level: level.spec.geometry.resize_px))

    def refuse_unreadable(self) -> None:
        """For whoever takes all there are: raise the error of one that cannot be used, if there is one."""
        for error in self.unreadable.values():
            raise error

    def __missing__(self, name: str) -> "CachedTeacher":
        if name in self.unreadable:
            raise self.unreadable[name]
        raise KeyError(name)


class CachedTeacher:
    """One teacher's features in a cache. Get it from `Cache.teachers`."""

    def __init__(self, cache: Cache, name: str) -> None:
        self._cache = cache
        self._group = unit_group(name)
        self.name = name
        place = cache.storage.at(f"{self._group}/{DOCUMENT}")
        try:
            self.spec = TeacherSpec.from_json(_attributes(cache.storage, self._group), place)
        except CorruptShardError as exc:
            cure = f"or drop the teacher and build it again: radio-cache drop-teacher {cache.url} {name}"
            raise CorruptShardError(f"{exc}; {cure}") from exc
        if self.spec.name != name:
            raise CorruptShardError(
                f"{place} is that of teacher '{self.spec.name}', not of '{name}': restore it from a copy, or drop '{name}' and "
                "build it again"
            )
        refuse_unknown(self.spec.codec, place)

    def __reduce__(self) -> tuple[type["CachedTeacher"], tuple[Cache, str]]:
        return (CachedTeacher, (self._cache, self.name))

    @cached_property
    def _shards(self) -> ShardReader:
        cache, codec = self._cache, self.codec
        storage, folder, shape = cache.storage, f"{self._group}/spatial", self.row_shape
        expected = spatial_document(cache.meta, self.spec, codec)
        try:
            found = storage.read_at_most(f"{folder}/{DOCUMENT}", MAX_DOCUMENT_BYTES)
            difference = array_difference(found, expected, grows_along=1)
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
        try:
            arrays = {name: PlainArray(storage, f"{folder}/{name}").read(holes=False) for name in names}
            self._refuse_other_arrays(arrays)
            codec = codec_from_json(self.spec.codec, arrays, channels=self.spec.spatial_dim)
            row = codec.row_shape(self.spec.geometry.grid_hw, self.spec.spatial_dim)
            check_limit(
                f"bytes in a map of teacher '{self.name}'", math.prod(row) * codec.dtype.itemsize, MAX_ROW_BYTES
            )
        except (UnsupportedFormatError, StorageError):
            raise
        except StoreError as exc:
            raise StoreError(
                f"{storage.at(folder)} is damaged, and teacher '{self.name}' cannot be decoded without it ({exc}): "
                "restore it from a copy, or drop the teacher and build it again"
            ) from exc
        return codec

    def _refuse_other_arrays(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Arrays that are right in themselves may be those of another codec."""
        said: Any = self.spec.codec.get(ARRAYS_CRC32C)
        found = {name: crc32c(np.ascontiguousarray(array).tobytes()) for name, array in arrays.items()}
        if said is not None and said != found:
            known = cast(dict[str, Any], said if isinstance(said, dict) else {})
            others = sorted(name for name in {*known, *found} if known.get(name) != found.get(name))
            told = [f"'{name}' is {'another' if name in found else 'not there'}" for name in others]
            raise CorruptShardError(f"its arrays are not those that the teacher's spec names: {', '.join(told)}")

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Stored shape of one image's map."""
        return self.codec.row_shape(self.spec.geometry.grid_hw, self.spec.spatial_dim)

    def summaries(self, rows: Rows, *, view: int = 0) -> NDArray[np.float32]:
        """(len(rows), c) summaries of these rows. Raises MissingRowsError for rows that are not there."""
        if self.spec.summary_dim is None:
            raise StoreError(f"{self._cache.url}: teacher '{self.name}' has no summary, only maps")
        self._refuse_view(view)
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
        self._refuse_view(view)
        wanted = self._existing(rows)
        flat = out.reshape(len(rows), math.prod(shape[1:])).view(np.uint8)
        missing = self._shards.read(view, wanted, flat, verify=verify, threads=threads)
        if len(missing):
            holes = np.sort(wanted[missing])
            raise self._missing(holes, f"spatial/{self._shards.key(view, int(holes[0]))}")
        return out

    def batches(self, rows: Sequence[int]) -> Iterator[Sequence[int]]:
        """The rows in pieces whose decoded maps take a bounded part of the memory."""
        map_bytes = 4 * self.spec.spatial_dim * math.prod(self.spec.geometry.grid_hw)
        most = max(1, min(_BATCH_ROWS, _BATCH_BYTES // map_bytes))
        yield from (rows[first : first + most] for first in range(0, len(rows), most))

    def maps(self, rows: Rows, *, view: int = 0) -> NDArray[np.float32]:
        """(len(rows), h, w, c) decoded features of these rows."""
        return self.codec.decode(self.codes(rows, view=view))

    def views_of(self, rows: Rows, *, view: int) -> list[View]:
        """Which part of each image a view shows. Raises MissingRowsError for rows that are not there."""
        wanted = self._existing(rows)
        self._refuse_view(view)
        if view == 0:
            return [whole_view((int(h), int(w))) for h, w in self._cache.sizes_hw[wanted]]
        boxes, flipped = self._boxes[view, wanted], self._flipped[view, wanted]
        holes = wanted[boxes[:, 2] == 0]
        if len(holes):
            raise self._missing(holes, f"crop_xyxy/c/0/{holes[0] // self._cache.meta.shard_images}/0")
        return [View((x0, y0, x1, y1), bool(f)) for (x0, y0, x1, y1), f in zip(boxes.tolist(), flipped, strict=True)]

    def spatial_mean_std(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Per-channel mean and standard deviation of the maps, over every token that shows an image."""
        return self._mean_std("spatial", [receipt.num_tokens for receipt in self._done()])

    def summary_mean_std(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Per-channel mean and standard deviation of the summaries."""
        views = self.spec.views
        return self._mean_std("summary", [views * (r.num_rows - len(r.failures)) for r in self._done()])

    def fidelity(self) -> Fidelity | None:
        """What the stored maps kept of the teacher's, over all finished shards; None where nothing was measured.

        Measured while building. In a copy that was encoded again (`conversion`) it is an estimate from two measurements.
        """
        found = combined(receipt.fidelity for receipt in self._done() if receipt.fidelity)
        if found and self.conversion and self.conversion.fidelity:
            found = after(self.conversion.fidelity, found)
        return found and replace(found, variance=float(np.square(self.spatial_mean_std()[1]).sum()))

    @property
    def conversion(self) -> Conversion | None:
        """What the maps were encoded from, if it was not the teacher's own: a copy in another packing."""
        return conversion_of(self.spec.codec, self._cache.storage.at(f"{self._group}/{DOCUMENT}"))

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
        self._cache.refuse_unfounded()
        document = summary_document(self._cache.meta, self.spec)
        return _read_array(self._cache.storage, self.name, "summary", document, grows_along=1)

    @cached_property
    def _boxes(self) -> NDArray[Any]:
        document = crop_document(self._cache.meta, self.spec)
        return _read_array(self._cache.storage, self.name, "crop_xyxy", document, grows_along=1)

    @cached_property
    def _flipped(self) -> NDArray[Any]:
        document = flipped_document(self._cache.meta, self.spec)
        return _read_array(self._cache.storage, self.name, "flipped", document, grows_along=1)

    def _refuse_view(self, view: int) -> None:
        if not 0 <= view < self.spec.views:
            raise ShapeError(f"teacher '{self.name}' has {self.spec.views} views, and view {view} was asked for")

    def _mean_std(self, name: str, counts: list[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        shards = [receipt.shard for receipt in self._done()]
        if sum(counts) == 0:
            raise MissingRowsError(f"{self._cache.url}: teacher '{self.name}' has no finished shard yet: run the build")
        document = stats_document(self._cache.meta, stats_widths(self.spec)[name])
        by_shard = _read_array(self._cache.storage, self.name, f"stats/{name}", document, grows_along=0)
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


class _NoGroupError(NotACacheError):
    """There is no group of ours at a place."""


def is_cache(place: str | Path | Storage) -> bool:
    """Whether there is a radio-cache store at `place`, of any format version."""
    try:
        _attributes(open_storage(place))
    except NotACacheError:
        return False
    return True


def _read_array(storage: Storage, unit: str, name: str, document: bytes, *, grows_along: int) -> NDArray[Any]:
    """A whole small array of a unit, compared with what the unit's receipts vouch for.

    document: what its own says, but for a longer shape along the axis `grows_along`.
    Raises CorruptShardError naming the file and the cure.
    """
    place = f"{unit_group(unit)}/{name}"

    def damaged(file: str, what: str) -> CorruptShardError:
        grid = [int(part) for part in file.split("/")[1:] if part.isdigit()]
        if file == DOCUMENT:
            cure = f"radio-cache repair {storage.url} writes it again"
            return CorruptShardError(f"{storage.at(f'{place}/{file}')} is damaged: {what}: {cure}")
        return _damaged(storage, unit, f"{name}/{file}", grid[grows_along])

    def read() -> NDArray[Any]:
        array = PlainArray(storage, place, document=document, grows_along=grows_along, damaged=damaged)
        return array.read(vouched=UnitReceipts(storage, unit).checksums(name))

    try:
        return read()
    except CorruptShardError:
        return read()  # a builder that makes a shard again changes first its receipt and then its files


def _damaged(storage: Storage, unit: str, file: str, shard: int) -> CorruptShardError:
    return CorruptShardError(
        f"{storage.at(f'{unit_group(unit)}/{file}')} (shard {shard}) is damaged or gone, although there is a receipt for it: "
        f"radio-cache repair {storage.url}, then run the build again"
    )


def _attributes(storage: Storage, group: str = "") -> dict[str, Any]:
    """Our attributes of a Zarr group, read as JSON: no library, no defaults."""
    place = storage.at(group)
    path = f"{group}/{DOCUMENT}" if group else DOCUMENT
    try:
        text = storage.read_at_most(path, MAX_DOCUMENT_BYTES)
    except FileNotFoundError as exc:
        if storage.is_local and storage.local_path(group).is_file():
            raise NotACacheError(f"{place} is a file, not a radio-cache store, which is a folder") from exc
        if storage.is_local and not storage.local_path(group).exists():
            raise _NoGroupError(f"{place} does not exist") from exc
        what = "is a folder, but not" if storage.is_local else "does not hold"
        raise _NoGroupError(f"{place} {what} a radio-cache store: it has no {DOCUMENT}") from exc
    try:
        document = parse_json(text)
    except ValueError as exc:
        raise CorruptShardError(f"{storage.at(path)} is damaged ({exc}): restore it from a copy") from exc
    try:
        return dict(document["attributes"][ATTRIBUTES_KEY].items())
    except (AttributeError, KeyError, TypeError) as exc:
        raise NotACacheError(f"{place} is a Zarr group, but not a radio-cache store") from exc


__all__ = [
    "FORMAT_VERSION", "Cache", "CachedTeacher", "UnsupportedFormatError", "Verify", "digest", "is_cache",
    "read_receipt",
]  # fmt: skip
