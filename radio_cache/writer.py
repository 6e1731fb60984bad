"""Creation and growth of a cache, and commits of its shards: whole files, the receipt last.

Two processes that write the same shard write the same bytes, so the order does not matter. Two that write
different shards never touch the same file. Nothing is locked, and Zarr documents are written without a Zarr library.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from radio_cache.arrays.plain import stored_bytes
from radio_cache.codecs import Codec, codec_from_json
from radio_cache.errors import CorruptShardError, NotACacheError, StaleCacheError
from radio_cache.format.checksums import CRC_BYTES, Chunk, crc32c, parts_crc32c, with_crc
from radio_cache.format.documents import (
    INDEX_CHUNK,
    images_documents,
    index_documents,
    root_document,
    teacher_documents,
)
from radio_cache.format.schema import (
    ATTRIBUTES_KEY,
    IMAGES_UNIT,
    TRANSFORM,
    CacheMeta,
    Receipt,
    StoredFile,
    TeacherSpec,
    receipt_path,
    receipts_folder,
    unit_group,
)
from radio_cache.format.zarr_json import DOCUMENT, attributes_of, group_document, shape_of, with_shape
from radio_cache.images.index import ImageIndex, index_columns, index_group
from radio_cache.shards.encoding import shard_parts
from radio_cache.storage import open_storage
from radio_cache.storage.base import Storage
from radio_cache.storage.local import TEMPORARY, sync_folder, write_atomically

Place = Storage | str | Path
"""Where a cache lies: an open storage, a path or a URL."""


def refuse_occupied(place: Place) -> None:
    """Raise NotACacheError if there is a file at `place`, or a folder with something in it."""
    storage = open_storage(place)
    if storage.is_local:
        path = storage.local_path()
        occupied = path.exists() and (not path.is_dir() or any(path.iterdir()))
    else:
        # Leftovers of a creation that was killed before it wrote the root's document. On a disk it leaves none here.
        ours = (f"{IMAGES_UNIT}/", "teachers/")
        occupied = storage.exists(DOCUMENT) or any(not path.startswith(ours) for path, _ in storage.list_files())
    if occupied:
        raise NotACacheError(f"{storage.url} exists and is not empty: choose another place, or remove it")


def create_cache(place: Place, meta: CacheMeta, index: ImageIndex) -> CacheMeta:
    """Make an empty cache: the group, the image index, and arrays without data. All or nothing.

    Returns what was stored: `meta` with the place of the index.
    Raises NotACacheError if `place` is a file or a folder with something in it, or another process was faster.
    """
    storage = open_storage(place)
    refuse_occupied(storage)
    columns = index_columns(index)
    meta = replace(meta, index=index_group(columns))

    def files() -> Iterator[tuple[str, bytes]]:
        yield from _index_files(meta.index, columns)
        yield from _below(IMAGES_UNIT, images_documents(meta))
        # Zarr readers need a document in every group of the path.
        yield f"teachers/{DOCUMENT}", group_document()
        yield DOCUMENT, root_document(meta)

    if not storage.write_tree("", files(), last=DOCUMENT):
        raise NotACacheError(f"{storage.url} was made by another process a moment ago: run the same command again")
    return meta


def grow_cache(place: Place, meta: CacheMeta, index: ImageIndex) -> CacheMeta:
    """Make a cache longer. Killed at any moment it is the old cache or the new one, with all that was finished.

    meta: the longer cache's, with the same `shard_images`; index: all its images, the old ones first and unchanged.
    The last shard, if it was short, counts as unfinished for builds; its receipts still vouch for the rows they knew.
    Returns what was stored: `meta` with the place of the index. Raises StaleCacheError if the cache has other images by now.
    """
    storage = open_storage(place)
    columns = index_columns(index)
    # Read again: another process may have grown the cache since the caller opened it.
    old = CacheMeta.from_json(attributes_of(storage.read(DOCUMENT))[ATTRIBUTES_KEY])
    meta = replace(meta, index=index_group(columns))
    if old.num_images >= meta.num_images and old.index != meta.index:
        raise StaleCacheError(
            f"{storage.url}: another process has just added other images to it, {old.num_images:,} are there now: run the same "
            "command again"
        )
    # The new index first: it is named by its contents, so the old one stays valid meanwhile.
    for path, data in _index_files(meta.index, columns):
        storage.write(path, [data])
    # Arrays first: of an array that is longer than the cache, readers use only the rows that the cache declares.
    for path, data in _below(IMAGES_UNIT, images_documents(meta)):
        storage.write(path, [data])
    for name in storage.list_folders("teachers"):
        _grow_teacher(storage, unit_group(name), meta)
    storage.write(DOCUMENT, [root_document(meta)])
    if old.index == meta.index:
        return meta  # another process has just made the cache as long, and removed the unused indices itself
    # Readers that opened the old cache may still need its index. Earlier ones are unused.
    for name in storage.list_folders(IMAGES_UNIT):
        group = f"{IMAGES_UNIT}/{name}"
        if name.startswith("index-") and group not in (old.index, meta.index):
            storage.delete_tree(group)
    return meta


def _grow_teacher(storage: Storage, group: str, meta: CacheMeta) -> None:
    for name, axis, length in (
        ("spatial", 1, meta.num_images),
        ("summary", 1, meta.num_images),
        ("crop_xyxy", 1, meta.num_images),
        ("flipped", 1, meta.num_images),
        ("stats/spatial", 0, meta.num_shards),
        ("stats/summary", 0, meta.num_shards),
    ):
        path = f"{group}/{name}/{DOCUMENT}"
        try:
            document = storage.read(path)
        except FileNotFoundError:
            continue  # a teacher without summaries, or with one view
        shape = shape_of(document, storage.at(path))
        if shape[axis] < length:
            storage.write(path, [with_shape(document, (*shape[:axis], length, *shape[axis + 1 :]))])


def refuse_remains(place: Place, name: str) -> None:
    """Raise CorruptShardError if a teacher's receipts exist and its document does not.

    The receipts would be taken for those of a new teacher of that name.
    """
    storage = open_storage(place)
    document = f"{unit_group(name)}/{DOCUMENT}"
    # In this order: another process may just be making the teacher, document first.
    if next(storage.list_files(receipts_folder(name)), None) is not None and not storage.exists(document):
        raise CorruptShardError(
            f"{storage.at(document)} is gone, although there are receipts of teacher '{name}': restore it from a copy, or "
            f"radio-cache drop-teacher {storage.url} {name}, and build it again"
        )


def add_teacher(place: Place, meta: CacheMeta, spec: TeacherSpec, codec: Codec | None = None) -> None:
    """Make the group of a teacher that is not in the cache yet: its spec, its codec's arrays, and arrays without data.

    All or nothing; a group that is there already stays as it is. Files without a document and receipts, which a build may leave
    whose teacher was dropped meanwhile, are removed. Raises CorruptShardError for remains that receipts speak of.
    codec: the one `spec.codec` describes; may be left out where that needs no arrays.
    """
    refuse_remains(place, spec.name)
    known = codec or codec_from_json(spec.codec.parameters)
    if known.arrays():
        crcs = {name: crc32c(stored_bytes(array)) for name, array in known.arrays().items()}
        spec = replace(spec, codec=replace(spec.codec, array_checksums=crcs))

    def files() -> Iterator[tuple[str, bytes]]:
        yield from teacher_documents(meta, spec, known)
        for name, array in known.arrays().items():
            yield f"{TRANSFORM}/{name}/{_first_chunk(array)}", with_crc(stored_bytes(array))

    storage, group = open_storage(place), unit_group(spec.name)
    with storage.locked("teachers"):
        # In a bucket leftover files do no harm, and they may be those of another build that is adding the same teacher.
        if storage.is_local and not storage.exists(f"{group}/{DOCUMENT}"):
            storage.delete_tree(group)
        storage.write_tree(group, files(), last=DOCUMENT)


def _below(group: str, documents: Iterator[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    return ((f"{group}/{path}", data) for path, data in documents)


def _index_files(group: str, columns: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, bytes]]:
    yield from _below(group, index_documents(len(columns["key_ends"]), len(columns["key_bytes"])))
    for name, column in columns.items():
        side = max(1, min(len(column), INDEX_CHUNK))
        for number, first in enumerate(range(0, len(column), side)):
            part = column[first : first + side]
            chunk = np.zeros(side, column.dtype)  # the last one is stored in full size, too
            chunk[: len(part)] = part
            yield f"{group}/{name}/c/{number}", with_crc(stored_bytes(chunk))


def _first_chunk(array: NDArray[Any]) -> str:
    return "/".join(("c", *("0" for _ in array.shape)))


class ShardWriter:
    """Commits one unit's shard: hand over its arrays, then `commit`.

    Files are written whole, one by one; only the receipt makes them count. storage: open, or a path or URL.
    """

    def __init__(self, place: Place, unit: str, shard: int) -> None:
        self._storage = open_storage(place)
        self._unit, self._shard = unit, shard
        self._files: list[StoredFile] = []

    def write_plain(self, array: str, chunk: NDArray[Any], *, grid: tuple[int, ...]) -> None:
        """Write one chunk of an array without sharding, in the full chunk shape, at the chunk coordinates `grid`."""
        data = stored_bytes(chunk)
        self._write(_chunk_path(array, grid), [data, crc32c(data).to_bytes(4, "little")])

    def write_sharded(
        self,
        array: str,
        rows: Sequence[NDArray[Any] | None],
        *,
        grid: tuple[int, ...],
        chunks_per_shard: int,
        zstd_level: int | None = None,
        pool: Executor | None = None,
    ) -> None:
        """Write one shard whose inner chunks are `rows`; None leaves a hole.

        `zstd_level` is that of the array's codec, if it has one. Threads of `pool` compress, which does not change the bytes.
        """
        chunks: list[Chunk | None] = [None if row is None else _flat(row) for row in rows]
        if zstd_level is not None:
            compress = partial(_compressed_if_any, level=zstd_level)
            chunks = list(pool.map(compress, chunks) if pool else map(compress, chunks))
        path = _chunk_path(array, grid)
        self._write(path, shard_parts(chunks, chunks_per_shard, f"{unit_group(self._unit)}/{path}"))

    def write_stored(self, path: str, data: bytes) -> None:
        """Copy a whole file of another cache to this path below the unit's group."""
        view = memoryview(data)
        self._write(path, [view[:-CRC_BYTES], view[-CRC_BYTES:]])

    def commit(self, receipt: Mapping[str, Any]) -> Receipt:
        """Write the receipt, which makes the shard exist. `receipt` holds its fields except unit, shard and files."""
        done = Receipt(unit=self._unit, shard=self._shard, files=tuple(self._files), **receipt)
        self._storage.write(receipt_path(self._unit, self._shard), [json.dumps(done.to_json(), indent=1).encode()])
        return done

    def _write(self, relative: str, parts: list[Chunk]) -> None:
        self._storage.write(f"{unit_group(self._unit)}/{relative}", parts)
        num_bytes = sum(len(part) for part in parts)
        self._files.append(StoredFile(path=relative, num_bytes=num_bytes, crc32c=parts_crc32c(parts)))


def _chunk_path(array: str, grid: tuple[int, ...]) -> str:
    return "/".join((array, "c", *map(str, grid)))


def _flat(row: NDArray[Any]) -> memoryview:
    """Return the bytes of an array, little-endian, in C order; a view of them where possible."""
    stored = np.ascontiguousarray(row).astype(row.dtype.newbyteorder("<"), copy=False)
    return stored.reshape(-1).view(np.uint8).data


def _compressed_if_any(chunk: Chunk | None, *, level: int) -> bytes | None:
    return None if chunk is None else compressed(chunk, level=level)


def compressed(chunk: Chunk, *, level: int) -> bytes:
    """Return the stored bytes of a chunk for a codec with this zstd level."""
    # The frame records its decoded size, as readers expect. Zarr's crc32c stands behind it, so it has no checksum.
    return zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False).compress(chunk)


__all__ = [
    "TEMPORARY",
    "ImageIndex",
    "Place",
    "ShardWriter",
    "add_teacher",
    "compressed",
    "create_cache",
    "grow_cache",
    "refuse_occupied",
    "sync_folder",
    "teacher_documents",
    "write_atomically",
]
