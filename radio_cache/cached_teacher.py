"""One teacher's features in a cache: codes, maps, summaries, and what is known about them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from radio_cache.arrays.group import read_group_attributes
from radio_cache.arrays.plain import PlainArray
from radio_cache.arrays.verified import damaged_file, read_verified_array
from radio_cache.cache_files import CacheFiles
from radio_cache.codecs import Codec, codec_from_json, refuse_unknown
from radio_cache.errors import (
    CorruptShardError,
    MissingRowsError,
    ShapeError,
    StorageError,
    StoreError,
    UnsupportedFormatError,
)
from radio_cache.format.checksums import crc32c
from radio_cache.format.documents import (
    crop_document,
    flipped_document,
    spatial_document,
    stats_document,
    stats_widths,
    summary_document,
)
from radio_cache.format.schema import (
    MAX_ROW_BYTES,
    TRANSFORM,
    Receipt,
    TeacherSpec,
    check_limit,
    unit_group,
)
from radio_cache.format.transcoding import Transcoding, transcoding_of
from radio_cache.format.zarr_json import DOCUMENT, MAX_DOCUMENT_BYTES, array_difference
from radio_cache.geometry.crops import valid_hw
from radio_cache.geometry.views import View, whole_view
from radio_cache.receipts import read_receipt
from radio_cache.shards.batch import Verify
from radio_cache.shards.index_cache import ShardLayout
from radio_cache.shards.reader import ShardReader
from radio_cache.statistics.fidelity import Fidelity, chain_fidelity, combine_fidelity

Rows = NDArray[np.int64] | Sequence[int] | range

# Most rows decoded at a time, and most bytes of their float32 maps.
_BATCH_ROWS, _BATCH_BYTES = 32, 64 << 20


class Teachers(dict[str, "CachedTeacher"]):
    """Name -> teacher.

    Looking up an unreadable teacher, also by `in`, raises its error, because it is neither present nor absent.

    Attributes:
        unreadable: errors of teachers that exist and cannot be used, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unreadable: dict[str, StoreError] = {}

    def __contains__(self, name: object) -> bool:
        if name in self.unreadable:
            raise self.unreadable[str(name)]
        return super().__contains__(name)

    def names(self) -> tuple[str, ...]:
        """Return the names of the teachers, each once for all its input sizes."""
        return tuple(dict.fromkeys(teacher.spec.level_of or name for name, teacher in self.items()))

    def levels(self, name: str) -> tuple["CachedTeacher", ...]:
        """Return one teacher at all its input sizes, smallest first. Most have one.

        Raises:
            KeyError: for an absent teacher. The error of an unreadable level is raised, too.
        """
        teachers = [teacher for teacher in self.values() if name in (teacher.name, teacher.spec.level_of)]
        for unreadable_name, error in self.unreadable.items():
            if name in (
                unreadable_name,
                unreadable_name.partition("@")[0],
            ):  # the spec that names the teacher of a level cannot be read
                raise error
        if not teachers:
            raise KeyError(name)
        return tuple(sorted(teachers, key=lambda level: level.spec.geometry.resize_px))

    def refuse_unreadable(self) -> None:
        """Raise the error of an unreadable teacher, if there is one, for callers that use all teachers."""
        for error in self.unreadable.values():
            raise error

    def __missing__(self, name: str) -> "CachedTeacher":
        if name in self.unreadable:
            raise self.unreadable[name]
        raise KeyError(name)


class CachedTeacher:
    """One teacher's features in a cache. Get it from `Cache.teachers`."""

    def __init__(self, files: CacheFiles, name: str) -> None:
        self._files = files
        self._group = unit_group(name)
        self.name = name
        place = files.storage.at(f"{self._group}/{DOCUMENT}")
        try:
            self.spec = TeacherSpec.from_json(read_group_attributes(files.storage, self._group), place)
        except CorruptShardError as exc:
            cure = f"or drop the teacher and build it again: radio-cache drop-teacher {files.url} {name}"
            raise CorruptShardError(f"{exc}; {cure}") from exc
        if self.spec.name != name:
            raise CorruptShardError(
                f"{place} is that of teacher '{self.spec.name}', not of '{name}': restore it from a copy, or drop '{name}' and "
                "build it again"
            )
        refuse_unknown(self.spec.codec.parameters, place)

    def __reduce__(self) -> tuple[type["CachedTeacher"], tuple[CacheFiles, str]]:
        return (CachedTeacher, (self._files, self.name))

    @cached_property
    def _shards(self) -> ShardReader:
        files, codec = self._files, self.codec
        storage, folder, shape = files.storage, f"{self._group}/spatial", self.row_shape
        expected = spatial_document(files.meta, self.spec, codec)
        try:
            stored_document = storage.read_at_most(f"{folder}/{DOCUMENT}", MAX_DOCUMENT_BYTES)
            difference = array_difference(stored_document, expected, grows_along=1)
        except FileNotFoundError:
            difference = "is gone"
        if difference:
            raise CorruptShardError(
                f"{storage.at(folder)}/{DOCUMENT} {difference}: radio-cache repair {files.url}, then run the build again"
            )
        # The shape follows from the spec and is compared with the stored document above.
        row_bytes = math.prod(shape) * codec.dtype.itemsize
        layout = ShardLayout(
            row_axes=len(shape),
            row_bytes=row_bytes,
            shard_images=files.meta.shard_images,
            zstd=codec.zstd_level is not None,
        )
        return ShardReader(storage, folder, layout)

    @cached_property
    def codec(self) -> Codec:
        """The codec of the stored codes."""
        storage, folder = self._files.storage, f"{self._group}/{TRANSFORM}"
        # Arrays that lie there, not those that the spec lists: documents of the first caches have no list.
        names = storage.list_folders(folder)
        try:
            # Without holes, so that an array is refused that declares more than is stored.
            arrays = {name: PlainArray(storage, f"{folder}/{name}").read(holes=False) for name in names}
            self._refuse_other_arrays(arrays)
            codec = codec_from_json(self.spec.codec.parameters, arrays, channels=self.spec.spatial_dim)
            # Buffers are allocated by the size of a row, which a hostile codec may declare.
            row = codec.row_shape(self.spec.geometry.grid_hw, self.spec.spatial_dim)
            check_limit(
                f"bytes in a map of teacher '{self.name}'", math.prod(row) * codec.dtype.itemsize, MAX_ROW_BYTES
            )
        # A newer codec and a bucket that does not answer are no damage.
        except (UnsupportedFormatError, StorageError):
            raise
        except StoreError as exc:
            raise StoreError(
                f"{storage.at(folder)} is damaged, and teacher '{self.name}' cannot be decoded without it ({exc}): "
                "restore it from a copy, or drop the teacher and build it again"
            ) from exc
        return codec

    def _refuse_other_arrays(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Compare arrays with the spec's checksums: intact arrays may belong to another codec."""
        recorded = self.spec.codec.array_checksums
        checksums = {name: crc32c(np.ascontiguousarray(array).tobytes()) for name, array in arrays.items()}
        if recorded is not None and recorded != checksums:
            known = cast(dict[str, Any], recorded if isinstance(recorded, dict) else {})
            others = sorted(name for name in {*known, *checksums} if known.get(name) != checksums.get(name))
            differences = [f"'{name}' is {'another' if name in checksums else 'not there'}" for name in others]
            raise CorruptShardError(f"its arrays are not those that the teacher's spec names: {', '.join(differences)}")

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Stored shape of one image's map."""
        return self.codec.row_shape(self.spec.geometry.grid_hw, self.spec.spatial_dim)

    def summaries(self, rows: Rows, *, view: int = 0) -> NDArray[np.float32]:
        """Return the summaries (len(rows), c) of these rows.

        Raises:
            MissingRowsError: for rows that are not in the cache.
        """
        if self.spec.summary_dim is None:
            raise StoreError(f"{self._files.url}: teacher '{self.name}' has no summary, only maps")
        self._refuse_view(view)
        indices = self._existing(rows)
        # (views, n, c) -> (m, c), float16
        stored = self._summaries[view][indices]
        # NaN is the fill value of summaries: a row without one was never written.
        if np.isnan(stored).any():
            holes = indices[np.isnan(stored).any(axis=1)]
            raise self._missing(holes, f"summary/c/{view}/{holes[0] // self._files.meta.shard_images}/0")
        return stored.astype(np.float32)

    def codes(
        self, rows: Rows, *, view: int = 0, out: NDArray[Any] | None = None, verify: Verify = "always", threads: int = 1
    ) -> NDArray[Any]:
        """Return the stored codes (len(rows), *row_shape) of these rows' maps; `codec.decode` returns features.

        Args:
            rows: of the images.
            view: 0 for the whole image, or an extra view.
            out: buffer to fill instead of a new array, C-contiguous, of that shape and the codec's type.
            verify: compare checksums always, at the first read of a row in this process, or never.
            threads: number of threads for the batch, including this one. For object stores more threads wait for requests.

        Raises:
            MissingRowsError: for rows that are not in the cache.
            CorruptShardError: for bytes that fail their checksum.
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
        indices = self._existing(rows)
        # (m, *row_shape) -> (m, row_bytes), a view of the caller's buffer
        flat = out.reshape(len(rows), math.prod(shape[1:])).view(np.uint8)
        missing = self._shards.read(view, indices, flat, verify=verify, threads=threads)
        if len(missing):
            holes = np.sort(indices[missing])
            raise self._missing(holes, f"spatial/{self._shards.key(view, int(holes[0]))}")
        return out

    def batches(self, rows: Sequence[int]) -> Iterator[Sequence[int]]:
        """Yield the rows in batches whose decoded maps take bounded memory."""
        # Decoded maps are float32.
        map_bytes = 4 * self.spec.spatial_dim * math.prod(self.spec.geometry.grid_hw)
        most_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // map_bytes))
        yield from (rows[first : first + most_rows] for first in range(0, len(rows), most_rows))

    def maps(self, rows: Rows, *, view: int = 0) -> NDArray[np.float32]:
        """Return the decoded features (len(rows), h, w, c) of these rows."""
        return self.codec.decode(self.codes(rows, view=view))

    def views_of(self, rows: Rows, *, view: int) -> list[View]:
        """Return the boxes of a view of these rows.

        Raises:
            MissingRowsError: for rows that are not in the cache.
        """
        indices = self._existing(rows)
        self._refuse_view(view)
        if view == 0:
            return [whole_view((int(h), int(w))) for h, w in self._files.sizes_hw[indices]]
        # (views, n, 4) -> (m, 4) and (views, n) -> (m,)
        boxes, flipped = self._boxes[view, indices], self._flipped[view, indices]
        # A view has a width of at least one pixel, so 0 is the fill value.
        holes = indices[boxes[:, 2] == 0]
        if len(holes):
            raise self._missing(holes, f"crop_xyxy/c/0/{holes[0] // self._files.meta.shard_images}/0")
        return [View((x0, y0, x1, y1), bool(f)) for (x0, y0, x1, y1), f in zip(boxes.tolist(), flipped, strict=True)]

    def spatial_mean_std(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the mean and standard deviation (c,) of the maps, over every token that is not padding."""
        return self._mean_std("spatial", [receipt.num_tokens for receipt in self._done()])

    def summary_mean_std(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the mean and standard deviation (c,) of the summaries."""
        views = self.spec.views
        return self._mean_std("summary", [views * (r.num_rows - len(r.failures)) for r in self._done()])

    def fidelity(self) -> Fidelity | None:
        """Return the fidelity of the stored maps to the teacher's, over all finished shards; None if it was not measured.

        It is measured by the build. For a transcoded copy (`conversion`) it is an estimate from two measurements.
        """
        fidelity = combine_fidelity(receipt.fidelity for receipt in self._done() if receipt.fidelity)
        if fidelity and self.conversion and self.conversion.fidelity:
            fidelity = chain_fidelity(self.conversion.fidelity, fidelity)
        # The variance over all shards includes how their means differ, which that of each shard leaves out.
        return fidelity and replace(fidelity, variance=float(np.square(self.spatial_mean_std()[1]).sum()))

    @property
    def conversion(self) -> Transcoding | None:
        """The source codec of a transcoded copy; None if the maps were encoded from the teacher's own."""
        return transcoding_of(self.spec.codec, self._files.storage.at(f"{self._group}/{DOCUMENT}"))

    def stored_bytes(self) -> int:
        """Return the bytes on disk of the finished shards of this teacher."""
        return sum(file.num_bytes for receipt in self._done() for file in receipt.files)

    def valid_hw(self, row: int) -> tuple[int, int]:
        """Return height and width of the valid part of this teacher's input, in input pixels."""
        h, w = self._files.sizes_hw[row]
        return valid_hw((int(h), int(w)), self.spec.geometry)

    def _done(self) -> list[Receipt]:
        return [receipt for receipt in self._files.receipts(self.name) if receipt]

    @cached_property
    def _summaries(self) -> NDArray[Any]:
        # Kept in memory: a summary has a few kilobytes, and 1.28 million of 1280 channels take 3.3 GB.
        self._files.refuse_unfounded()
        document = summary_document(self._files.meta, self.spec)
        return read_verified_array(self._files.storage, self.name, "summary", document, grows_along=1)

    @cached_property
    def _boxes(self) -> NDArray[Any]:
        document = crop_document(self._files.meta, self.spec)
        return read_verified_array(self._files.storage, self.name, "crop_xyxy", document, grows_along=1)

    @cached_property
    def _flipped(self) -> NDArray[Any]:
        document = flipped_document(self._files.meta, self.spec)
        return read_verified_array(self._files.storage, self.name, "flipped", document, grows_along=1)

    def _refuse_view(self, view: int) -> None:
        if not 0 <= view < self.spec.views:
            raise ShapeError(f"teacher '{self.name}' has {self.spec.views} views, and view {view} was asked for")

    def _mean_std(self, name: str, counts: list[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        shards = [receipt.shard for receipt in self._done()]
        if sum(counts) == 0:
            why = "has no finished shard yet: run the build"
            if shards:
                why = "has finished shards, but none of their images is usable and has a token: there are no statistics"
            raise MissingRowsError(f"{self._files.url}: teacher '{self.name}' {why}")
        document = stats_document(self._files.meta, stats_widths(self.spec)[name])
        by_shard = read_verified_array(self._files.storage, self.name, f"stats/{name}", document, grows_along=0)
        holes = [shard for shard in shards if np.isnan(by_shard[shard]).any()]
        if holes:
            raise damaged_file(self._files.storage, self.name, f"stats/{name}/c/{holes[0]}/0/0", holes[0])
        # (shards, 2, c) -> (2, c) sums of x and of x^2
        sums = by_shard[shards].sum(axis=0)
        mean = sums[0] / sum(counts)
        # Rounding can make the variance of a constant channel slightly negative.
        return mean, np.sqrt(np.maximum(sums[1] / sum(counts) - mean**2, 0.0))

    def _existing(self, rows: Rows) -> NDArray[np.int64]:
        indices = np.asarray(rows, dtype=np.int64)
        outside = (indices < 0) | (indices >= self._files.num_images)
        if outside.any():
            raise self._missing(indices[outside])
        return indices

    def _missing(self, rows: NDArray[np.int64], file: str | None = None) -> StoreError:
        """Return the error for rows that are not stored.

        Args:
            rows: at least one.
            file: of the first row, below the teacher's group; None for rows outside the cache.
        """
        shard = int(rows[0]) // self._files.meta.shard_images
        receipt = read_receipt(self._files.storage, self.name, shard) if file else None
        # The receipt covers the row, so its file is damaged. Without a receipt the shard is only unfinished.
        if receipt and rows[0] not in [failure.row for failure in receipt.failures]:
            return damaged_file(self._files.storage, self.name, str(file), shard)
        listed = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        return MissingRowsError(
            f"{self._files.url}: teacher '{self.name}' has nothing for row {listed}: the image is unusable or its "
            "shard is not built yet; ask `usable_rows`, or run the build again"
        )
