"""Reading a cache: which rows are there, their summaries, maps, labels and pixels.

Arrays are standard Zarr v3; the hot path reads the shard's index once, then one byte range per image straight into the
caller's buffer, and checks every chunk's crc32c. Nothing here needs torch.
"""

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
import zstandard
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
from radio_cache.schema import (
    ATTRIBUTES_KEY,
    FORMAT_VERSION,
    IMAGES_UNIT,
    TRANSFORM,
    CacheMeta,
    Failure,
    ImageStatus,
    Receipt,
    TeacherSpec,
    receipt_path,
    unit_group,
)
from radio_cache.shards import CRC_BYTES, crc32c, decode_index, file_crc32c, index_bytes
from radio_cache.writer import TEMPORARY, ImageIndex

Verify = Literal["always", "never"]
Rows = NDArray[np.int64] | Sequence[int] | range

_MAX_OPEN_FILES = 256


class Cache:
    """An open cache. Cheap to open, safe to share between threads, safe to fork and to pickle.

    Raises NotACacheError or UnsupportedFormatError when `path` does not hold one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        attributes = _attributes(self.path)
        if "format_version" not in attributes:
            raise NotACacheError(f"{self.path} is a part of a radio-cache store: open the store it belongs to")
        self.meta = CacheMeta.from_json(attributes)
        teachers = self.path / "teachers"
        names = sorted(
            entry.name for entry in teachers.iterdir() if TEMPORARY not in entry.name and (entry / "zarr.json").exists()
        )
        self.teachers = {name: CachedTeacher(self, name) for name in names}

    def __reduce__(self) -> tuple[type["Cache"], tuple[Path]]:
        return (Cache, (self.path,))

    @property
    def num_images(self) -> int:
        return self.meta.num_images

    @cached_property
    def index(self) -> ImageIndex:
        """Keys, labels and places of all images, in row order."""
        ends = self._column("key_ends").astype(np.int64)
        text = self._column("key_bytes").tobytes()
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
        keys = [text[a:b].decode("utf-8", "surrogateescape") for a, b in zip(starts, ends, strict=True)]
        return ImageIndex(
            keys, self._column("label"), self._column("container"), self._column("offset"), self._column("length")
        )

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
        return [read_receipt(self.path, unit, shard) for shard in range(self.meta.num_shards)]

    def failures(self) -> list[Failure]:
        """The images that cannot be used, and why, as far as the build has come."""
        return [failure for receipt in self.receipts(IMAGES_UNIT) if receipt for failure in receipt.failures]

    def usable_rows(self, teachers: Iterable[str] = ()) -> NDArray[np.int64]:
        """Rows whose image is fine and whose shards are there for every teacher named, in order."""
        status = self._column("status")
        usable = status == ImageStatus.OK
        for unit in (IMAGES_UNIT, *teachers):
            for shard, receipt in enumerate(self.receipts(unit)):
                rows = self.meta.shard_rows(shard)
                if receipt is None:
                    usable[rows] = False
                elif (status[rows] == ImageStatus.NOT_SEEN).any():
                    raise _damaged(self.path, IMAGES_UNIT, f"status/c/{shard}", shard)
        return np.flatnonzero(usable)

    def read_file(self, row: int) -> bytes:
        """The bytes of an image file, from where the build found it.

        Raises ImageError if it is gone, or is no longer the file that the teachers saw.
        """
        index = self.index
        container = self.meta.containers[index.container[row]]
        data = read_image_file(
            Path(container.path), index.keys[row].removeprefix(container.prefix),
            int(index.offset[row]), int(index.length[row]),
        )  # fmt: skip
        if digest(data) != self.digests[row].tobytes():
            raise ImageError(f"{index.keys[row]} has changed since the cache was built: build the cache again")
        return data

    def _column(self, name: str) -> NDArray[Any]:
        return _read_array(self.path, IMAGES_UNIT, name)


class CachedTeacher:
    """One teacher's features in a cache. Get it from `Cache.teachers`."""

    def __init__(self, cache: Cache, name: str) -> None:
        self._cache = cache
        self._folder = cache.path / unit_group(name)
        self.name = name
        self.spec = TeacherSpec.from_json(_attributes(self._folder))
        refuse_unknown(self.spec.codec)

    @cached_property
    def _shards(self) -> "_ShardFiles":
        zstd = self.codec.zstd_level is not None
        return _ShardFiles(
            self._folder / "spatial", self._cache.meta.shard_images, axes=len(self.row_shape), compressed=zstd
        )

    @cached_property
    def codec(self) -> Codec:
        """What the stored codes mean."""
        folder = self._folder / TRANSFORM
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.exists() else []
        arrays = {name: _read_array(self._cache.path, self.name, f"{TRANSFORM}/{name}") for name in names}
        try:
            codec = codec_from_json(self.spec.codec, arrays)
            codec.row_shape(self.spec.geometry.grid_hw, self.spec.spatial_dim)
        except UnsupportedFormatError:
            raise
        except StoreError as exc:
            raise StoreError(
                f"{folder} is damaged, and teacher '{self.name}' cannot be decoded without it ({exc}): restore it from a "
                f"copy, or drop the teacher and build it again"
            ) from exc
        return codec

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Stored shape of one image's map."""
        return self.codec.row_shape(self.spec.geometry.grid_hw, self.spec.spatial_dim)

    def summaries(self, rows: Rows, *, view: int = 0) -> NDArray[np.float32]:
        """(len(rows), c) summaries of these rows. Raises MissingRowsError for rows that are not there."""
        if self.spec.summary_dim is None:
            raise StoreError(f"{self._cache.path}: teacher '{self.name}' has no summary, only maps")
        wanted = self._existing(rows)
        stored = self._summaries[view][wanted]
        if np.isnan(stored).any():
            holes = wanted[np.isnan(stored).any(axis=1)]
            raise self._missing(holes, f"summary/c/{view}/{holes[0] // self._cache.meta.shard_images}/0")
        return stored.astype(np.float32)

    def codes(
        self, rows: Rows, *, view: int = 0, out: NDArray[Any] | None = None, verify: Verify = "always"
    ) -> NDArray[Any]:
        """(len(rows), *row_shape) stored codes of these rows' maps, in the codec's type; `codec.decode` gives features.

        out: a buffer to fill instead of a new array; C-contiguous, of that shape and type.
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
        wanted = self._existing(rows)
        flat = out.reshape(len(rows), int(np.prod(shape[1:]))).view(np.uint8)
        for position in np.argsort(wanted, kind="stable"):
            row = int(wanted[position])
            if not self._shards.read(view, row, flat[position].data, verify=verify):
                shard = row // self._cache.meta.shard_images
                raise self._missing(wanted[[position]], f"spatial/{self._shards.key(view, shard)}")
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
        return _read_array(self._cache.path, self.name, "summary")

    def _mean_std(self, name: str, counts: list[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        shards = [receipt.shard for receipt in self._done()]
        if sum(counts) == 0:
            raise MissingRowsError(
                f"{self._cache.path}: teacher '{self.name}' has no finished shard yet: run the build"
            )
        by_shard = _read_array(self._cache.path, self.name, f"stats/{name}")
        holes = [shard for shard in shards if np.isnan(by_shard[shard]).any()]
        if holes:
            raise _damaged(self._cache.path, self.name, f"stats/{name}/c/{holes[0]}/0/0", holes[0])
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
        receipt = read_receipt(self._cache.path, self.name, shard) if file else None
        if receipt and rows[0] not in [failure.row for failure in receipt.failures]:
            return _damaged(self._cache.path, self.name, str(file), shard)
        listed = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        return MissingRowsError(
            f"{self._cache.path}: teacher '{self.name}' has nothing for row {listed}: the image is unusable or its "
            "shard is not built yet; ask `usable_rows`, or run the build again"
        )


class _OpenFiles:
    """Descriptors and indexes of a process's open shards, the least recently used first."""

    def __init__(self) -> None:
        self.shards: OrderedDict[tuple[int, int], tuple[int, NDArray[np.uint64]]] = OrderedDict()
        self.lock = threading.Lock()


class _ShardFiles:
    """Reads inner chunks of one sharded array whose chunk is one image of one view, with `axes` axes of its own."""

    def __init__(self, folder: Path, shard_images: int, *, axes: int, compressed: bool) -> None:
        self._folder, self._shard_images, self._axes, self._compressed = folder, shard_images, axes, compressed
        # By process: after a fork, a thread that is not there any more may hold the parent's lock for ever.
        self._open: dict[int, _OpenFiles] = {}

    def read(self, view: int, row: int, out: memoryview, *, verify: Verify) -> bool:
        """Fill `out` with the bytes of a row; False if the store has a hole there."""
        shard, number = divmod(row, self._shard_images)
        opened = self._open.get(os.getpid()) or self._open.setdefault(os.getpid(), _OpenFiles())
        with opened.lock:
            descriptor, index = self._opened(opened, view, shard)
            if descriptor < 0 or index[number, 1] == np.uint64(2**64 - 1):
                return False
            offset, length = int(index[number, 0]), int(index[number, 1])
            crc = bytearray(CRC_BYTES)
            # zstd writes at most a little more than it was given; what claims to be longer is not one of our chunks.
            longest = len(out) + (len(out) >> 7 if self._compressed else 0) + 64
            stored = memoryview(bytearray(min(length, longest) - CRC_BYTES)) if self._compressed else out
            # Inside the lock: another thread could close the descriptor of a shard that was not used for long.
            got = os.preadv(descriptor, [stored, crc], offset)
        if length != len(stored) + CRC_BYTES or got != length:
            raise CorruptShardError(f"{self._path(view, shard)}: row {row} is cut short ({got} of {length} bytes)")
        if verify == "always" and crc32c(stored) != int.from_bytes(crc, "little"):
            raise CorruptShardError(
                f"{self._path(view, shard)}: row {row} does not match its checksum: `radio-cache repair` drops its "
                "shard, and the build makes it again"
            )
        if self._compressed:
            out[:] = self._decompressed(stored, len(out), f"{self._path(view, shard)}: row {row}")
        return True

    def _decompressed(self, stored: memoryview, length: int, place: str) -> bytes:
        try:
            # The frame says how much it holds; believed only if it is what the array's shape says.
            if zstandard.frame_content_size(stored) == length:
                data = zstandard.ZstdDecompressor().decompress(stored)
                if len(data) == length:
                    return data
        except zstandard.ZstdError as exc:
            raise CorruptShardError(f"{place} is not a zstd frame ({exc})") from exc
        raise CorruptShardError(f"{place} does not hold {length} bytes")

    def _opened(self, opened: _OpenFiles, view: int, shard: int) -> tuple[int, NDArray[np.uint64]]:
        key = (view, shard)
        if key not in opened.shards:
            if len(opened.shards) >= _MAX_OPEN_FILES:
                os.close(opened.shards.popitem(last=False)[1][0])
            found = self._open_shard(self._path(view, shard))
            if found is None:
                return -1, np.empty((0, 2), np.uint64)
            opened.shards[key] = found
        opened.shards.move_to_end(key)
        return opened.shards[key]

    def _open_shard(self, path: Path) -> tuple[int, NDArray[np.uint64]] | None:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            size, length = os.fstat(descriptor).st_size, index_bytes(self._shard_images)
            if size < length:
                raise CorruptShardError(f"{path}: {size} bytes are too few to hold this shard's index")
            return descriptor, decode_index(os.pread(descriptor, length, size - length), path)
        except CorruptShardError:
            os.close(descriptor)
            raise

    def key(self, view: int, shard: int) -> str:
        """Chunk key of a shard."""
        return f"c/{view}/{shard}" + "/0" * self._axes

    def _path(self, view: int, shard: int) -> Path:
        return self._folder / self.key(view, shard)

    def __del__(self) -> None:
        if os.getpid() in self._open:
            for descriptor, _ in self._open[os.getpid()].shards.values():
                os.close(descriptor)


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


def read_receipt(cache_path: Path, unit: str, shard: int) -> Receipt | None:
    """The receipt of one shard, or None if the shard has not been made."""
    path = cache_path / receipt_path(unit, shard)
    try:
        data = json.loads(path.read_bytes())
        return Receipt.from_json(data)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, StoreError) as exc:
        raise CorruptShardError(
            f"{path} is damaged ({exc}): radio-cache repair {cache_path}, then run the build again"
        ) from exc


def is_cache(path: Path) -> bool:
    """Whether there is a radio-cache store at `path`, of any format version."""
    try:
        _attributes(path)
    except NotACacheError:
        return False
    return True


def _read_array(cache_path: Path, unit: str, name: str) -> NDArray[Any]:
    """A whole small array of a unit. Raises CorruptShardError naming the file and the cure."""
    path = cache_path / unit_group(unit) / name
    try:
        return np.asarray(zarr.open_array(path, mode="r")[...])
    except ValueError as exc:  # zarr's word for a checksum that does not match, without saying where
        for receipt_file in sorted((cache_path / receipt_path(unit, 0)).parent.glob("*.json")):
            receipt = Receipt.from_json(json.loads(receipt_file.read_bytes()))
            for file in receipt.files:
                stored = cache_path / unit_group(unit) / file.path
                ours = file.path.startswith(f"{name}/")
                if ours and not (stored.exists() and file_crc32c(stored.read_bytes()) == file.crc32c):
                    raise _damaged(cache_path, unit, file.path, receipt.shard) from exc
        raise CorruptShardError(f"{path} is damaged ({exc}): restore it, or build the cache again") from exc


def _damaged(cache_path: Path, unit: str, file: str, shard: int) -> CorruptShardError:
    return CorruptShardError(
        f"{cache_path / unit_group(unit) / file} is damaged or gone, although there is a receipt for it: "
        f"radio-cache repair {cache_path}, then run the build again"
    )


def _attributes(path: Path) -> dict[str, Any]:
    """Our attributes of the Zarr group at `path`, read as JSON: no library, no defaults."""
    if not path.exists():
        raise NotACacheError(f"{path} does not exist")
    if not path.is_dir():
        raise NotACacheError(f"{path} is a file, not a radio-cache store, which is a folder")
    try:
        document = json.loads((path / "zarr.json").read_bytes())
        return dict(document["attributes"][ATTRIBUTES_KEY].items())
    except FileNotFoundError as exc:
        raise NotACacheError(f"{path} is a folder, but not a radio-cache store: it has no zarr.json") from exc
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise NotACacheError(f"{path} is a Zarr group, but not a radio-cache store") from exc


__all__ = [
    "FORMAT_VERSION", "Cache", "CachedTeacher", "UnsupportedFormatError", "digest", "is_cache", "read_image_file",
    "read_receipt",
]  # fmt: skip
