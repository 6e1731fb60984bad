"""Creating a cache, and committing a shard of it: whole files, renamed into place, the receipt last.

Two processes that write the same shard write the same bytes, so whoever renames last changes nothing; two that write
different shards never touch the same file. Nothing is locked.
"""

import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zstandard
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec

from radio_cache.codecs import Codec, codec_from_json
from radio_cache.errors import NotACacheError
from radio_cache.schema import (
    ATTRIBUTES_KEY,
    IMAGES_UNIT,
    TRANSFORM,
    CacheMeta,
    Receipt,
    StoredFile,
    TeacherSpec,
    receipt_path,
    unit_group,
)
from radio_cache.shards import encode_shard, file_crc32c, with_crc

TEMPORARY = ".tmp-"
"""Names of files and folders in the making contain this; a killed process may leave some behind."""

_INDEX_CHUNK = 1 << 20
"""Rows of the image index in one chunk: it is written once, as a whole, and read as a whole."""


class ImageIndex:
    """The list of a cache's images, as columns. Written once, when the cache is created.

    keys: unique, one per image. labels (n,) int32, -1 without a label. container (n,): number in `CacheMeta.containers`.
    offset, length (n,): bytes within a tar; -1 for a file of its own.
    """

    def __init__(
        self, keys: Sequence[str], labels: NDArray[np.int32], container: NDArray[np.int32],
        offset: NDArray[np.int64], length: NDArray[np.int64],
    ) -> None:  # fmt: skip
        self.keys = list(keys)
        self.labels, self.container, self.offset, self.length = labels, container, offset, length


def refuse_occupied(path: Path) -> None:
    """Raise NotACacheError if there is a file at `path`, or a folder with something in it."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise NotACacheError(f"{path} exists and is not empty: choose another --out, or remove it")


def create_cache(path: Path, meta: CacheMeta, index: ImageIndex) -> None:
    """Make an empty cache: the group, the image index, and arrays without data. All or nothing.

    Raises NotACacheError if `path` is a file or a folder with something in it.
    """
    refuse_occupied(path)
    path.parent.mkdir(parents=True, exist_ok=True)

    def fill(folder: Path) -> None:
        root = zarr.create_group(folder, zarr_format=3, attributes={ATTRIBUTES_KEY: meta.to_json()})
        images = root.create_group(IMAGES_UNIT)
        encoded = [
            key.encode("utf-8", "surrogateescape") for key in index.keys
        ]  # file names are bytes, in any encoding
        columns: dict[str, NDArray[Any]] = {
            # Text as bytes and end offsets: variable-length strings are not yet part of the Zarr v3 standard.
            "key_bytes": np.frombuffer(b"".join(encoded), dtype=np.uint8),
            "key_ends": np.cumsum([len(key) for key in encoded], dtype=np.uint64),
            "label": index.labels,
            "container": index.container,
            "offset": index.offset,
            "length": index.length,
        }
        for name, column in columns.items():
            array = images.create_array(
                name, shape=column.shape, dtype=column.dtype, chunks=(min(len(column), _INDEX_CHUNK),),
                compressors=(Crc32cCodec(),), filters=None, fill_value=0,
            )  # fmt: skip
            array[:] = column
        n, s = meta.num_images, meta.shard_images
        _plain_array(images, "status", (n,), (s,), "uint8", 0)
        _plain_array(images, "size_hw", (n, 2), (s, 2), "int32", 0)
        _plain_array(images, "digest", (n, 16), (s, 16), "uint8", 0)
        root.create_group("teachers")

    _make_folder(path, fill)


def add_teacher(path: Path, meta: CacheMeta, spec: TeacherSpec, codec: Codec | None = None) -> None:
    """Make the group of a teacher that is not in the cache yet: its spec, its codec's arrays, and arrays without data.

    All or nothing. codec: the one `spec.codec` describes; may be left out where that needs no arrays.
    """
    codec = codec or codec_from_json(spec.codec)

    def fill(folder: Path) -> None:
        group = zarr.create_group(folder, zarr_format=3, attributes={ATTRIBUTES_KEY: spec.to_json()})
        n, s, views = meta.num_images, meta.shard_images, spec.views
        inner = (1, 1, *codec.row_shape(spec.geometry.grid_hw, spec.spatial_dim))
        compressors = [] if codec.zstd_level is None else [ZstdCodec(level=codec.zstd_level)]
        sharding = ShardingCodec(
            chunk_shape=inner,
            codecs=[BytesCodec(endian="little"), *compressors, Crc32cCodec()],
            index_codecs=[BytesCodec(endian="little"), Crc32cCodec()],
            index_location="end",
        )
        shape = (views, n, *inner[2:])
        group.create_array(
            "spatial", shape=shape, dtype=codec.dtype, chunks=(1, s, *inner[2:]), serializer=sharding,
            compressors=None, filters=None, fill_value=codec.fill_value,
        )  # fmt: skip
        if codec.arrays():
            transform = group.create_group(TRANSFORM)
            for name, array in codec.arrays().items():
                _plain_array(transform, name, array.shape, array.shape, str(array.dtype), 0)
                transform[name] = array
        num_shards = meta.num_shards
        stats = group.create_group("stats")
        _plain_array(stats, "spatial", (num_shards, 2, spec.spatial_dim), (1, 2, spec.spatial_dim), "float64", np.nan)
        if spec.summary_dim is not None:
            width = spec.summary_dim
            _plain_array(group, "summary", (views, n, width), (1, s, width), "float16", np.nan)
            _plain_array(stats, "summary", (num_shards, 2, width), (1, 2, width), "float64", np.nan)

    _make_folder(path / unit_group(spec.name), fill)


def _plain_array(
    group: zarr.Group, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str, fill_value: float
) -> None:
    group.create_array(
        name, shape=shape, dtype=dtype, chunks=chunks, compressors=(Crc32cCodec(),), filters=None, fill_value=fill_value
    )


def _make_folder(path: Path, fill: Callable[[Path], None]) -> None:
    temporary = path.with_name(f"{path.name}{_temporary_suffix()}")
    try:
        fill(temporary)
        sync_tree(temporary)
        try:
            temporary.rename(path)
        except OSError:
            # Another process made the same folder a moment ago; the caller compares what it holds.
            if not (path / "zarr.json").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)


class ShardWriter:
    """Commits one unit's shard: hand over its arrays, then `commit`.

    Files are written aside, synced and renamed one by one; only the receipt makes them count.
    """

    def __init__(self, cache_path: Path, unit: str, shard: int) -> None:
        self._cache_path = cache_path
        self._folder = cache_path / unit_group(unit)
        self._unit, self._shard = unit, shard
        self._files: list[StoredFile] = []

    def write_plain(self, array: str, chunk: NDArray[Any], *, grid: tuple[int, ...]) -> None:
        """One chunk of an array without sharding. `chunk` has the full chunk shape; `grid` is its chunk coordinate."""
        data = with_crc(np.ascontiguousarray(chunk).astype(chunk.dtype.newbyteorder("<"), copy=False).tobytes())
        self._write(f"{array}/c/{'/'.join(map(str, grid))}", data)

    def write_sharded(
        self,
        array: str,
        rows: Sequence[NDArray[Any] | None],
        *,
        grid: tuple[int, ...],
        chunks_per_shard: int,
        zstd_level: int | None = None,
    ) -> None:
        """One shard whose inner chunks are `rows`; None leaves a hole. zstd_level: of the array's codec, if it has one."""
        chunks = [None if row is None else np.ascontiguousarray(row).tobytes() for row in rows]
        if zstd_level is not None:
            compressor = zstandard.ZstdCompressor(level=zstd_level)
            chunks = [None if chunk is None else compressor.compress(chunk) for chunk in chunks]
        self._write(f"{array}/c/{'/'.join(map(str, grid))}", encode_shard(chunks, chunks_per_shard))

    def commit(self, receipt: Mapping[str, Any]) -> Receipt:
        """Write the receipt, which makes the shard exist. `receipt` holds its fields except unit, shard and files."""
        done = Receipt(unit=self._unit, shard=self._shard, files=tuple(self._files), **receipt)
        data = json.dumps(done.to_json(), indent=1).encode()
        write_atomically(self._cache_path / receipt_path(self._unit, self._shard), data)
        return done

    def _write(self, relative: str, data: bytes) -> None:
        write_atomically(self._folder / relative, data)
        self._files.append(StoredFile(path=relative, num_bytes=len(data), crc32c=file_crc32c(data)))


def write_atomically(path: Path, data: bytes) -> None:
    """After a crash the file has its old content or the new one, never a part: write aside, sync, rename, sync."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}{_temporary_suffix()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fdatasync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames in this folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Sync every file and folder below `path`."""
    for folder, _, files in os.walk(path):
        for name in files:
            descriptor = os.open(Path(folder) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(folder))


def remove_leftovers(path: Path) -> int:
    """Delete what killed processes of this machine left half-written below a cache; returns how many there were.

    Names carry host and process number, so nothing that a live process is writing is touched.
    """
    removed = 0
    for leftover in _leftovers(path):
        host, _, rest = leftover.name.rpartition(TEMPORARY)[2].rpartition("-")[0].rpartition("-")
        if host == socket.gethostname() and not _is_running(int(rest)):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
            removed += 1
    return removed


def _leftovers(path: Path) -> Iterator[Path]:
    yield from (entry for entry in path.parent.glob(f"{path.name}{TEMPORARY}*"))
    for folder, folders, files in os.walk(path):
        for name in list(folders):
            if TEMPORARY in name:
                folders.remove(name)
                yield Path(folder) / name
        yield from (Path(folder) / name for name in files if TEMPORARY in name)


def _temporary_suffix() -> str:
    return f"{TEMPORARY}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
