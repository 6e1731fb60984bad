"""What `benchmarks/storage.py` compares: the same rows, kept and read back in the ways people keep them.

A `Peer` is a way to write rows below a folder and a way to read a random batch of them into a buffer the caller owns.
Each reader is opened in a process of its own. WebDataset and "zarr-python, one by one" say in their names what they do
instead of a batch.
"""

import importlib
import importlib.util
import io
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radio_cache.codecs import Codec
from radio_cache.format.schema import CacheMeta, Container, TeacherSpec
from radio_cache.prefetch.page_memory import page_array
from radio_cache.reader import Cache
from radio_cache.shards.batch import Verify
from radio_cache.storage.local import LocalStorage
from radio_cache.writer import ImageIndex, ShardWriter, add_teacher, create_cache

Array = NDArray[Any]
SHARD_IMAGES = 128
SHARD_BYTES = 64 << 20
"""Of the peers that choose a shard's size in bytes."""
RAW, CACHE = "raw.bin", "cache.zarr"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one case: `num_rows` of them, of which `distinct` differ and come again and again.

    distinct: (d, *row_shape). spec and codec: of the teacher whose codes they are.
    """

    distinct: Array
    num_rows: int
    spec: TeacherSpec
    codec: Codec

    def __getitem__(self, row: int) -> Array:
        return self.distinct[row % len(self.distinct)]

    @property
    def row_bytes(self) -> int:
        return self.distinct[0].nbytes


@dataclass(frozen=True)
class Layout:
    """What a reader must know of the rows: pickled to its process."""

    num_rows: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def buffer_for(count: int, layout: Layout) -> Array:
    """Every reader gets the best memory there is; otherwise the allocator would be measured, too."""
    return page_array((count, *layout.shape), layout.dtype)


class Reader(ABC):
    """An open way of reading. Made in the process that reads."""

    random_access = True

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout = folder, layout
        self.open()

    @abstractmethod
    def open(self) -> None: ...

    @abstractmethod
    def read(self, rows: Array, out: Array) -> None:
        """Fill out[i] with row rows[i]."""


class Pread(Reader):
    """The floor: one file of rows, one positioned read each."""

    def open(self) -> None:
        self._file = os.open(self.folder / RAW, os.O_RDONLY)

    def read(self, rows: Array, out: Array) -> None:
        size = self.layout.row_bytes
        for number, row in enumerate(rows.tolist()):
            os.preadv(self._file, [memoryview(out[number]).cast("B")], row * size)


class PreadInThreads(Pread):
    """What the disk gives when it is asked for as much at a time as we ask for."""

    def open(self) -> None:
        super().open()
        self._pool = ThreadPoolExecutor(8)

    def read(self, rows: Array, out: Array) -> None:
        size = self.layout.row_bytes

        def read_one(number: int) -> None:
            os.preadv(self._file, [memoryview(out[number]).cast("B")], int(rows[number]) * size)

        for _ in self._pool.map(read_one, range(len(rows))):
            pass


class Memmap(Reader):
    def open(self) -> None:
        shape = (self.layout.num_rows, *self.layout.shape)
        self._rows = np.memmap(self.folder / RAW, np.dtype(self.layout.dtype), "r", shape=shape)

    def read(self, rows: Array, out: Array) -> None:
        for number, row in enumerate(rows.tolist()):
            out[number] = self._rows[row]


class NpyFiles(Reader):
    def open(self) -> None:
        self._folder = self.folder / "npy"

    def read(self, rows: Array, out: Array) -> None:
        for number, row in enumerate(rows.tolist()):
            out[number] = np.load(self._folder / f"{row:07d}.npy")


class Hdf5(Reader):
    def open(self) -> None:
        import h5py

        self._rows: Any = h5py.File(self.folder / "rows.h5", "r")["rows"]

    def read(self, rows: Array, out: Array) -> None:
        for number, row in enumerate(rows.tolist()):
            self._rows.read_direct(out, np.s_[row], np.s_[number])


class OurCache(Reader):
    verify: Verify = "never"
    threads = 1

    def open(self) -> None:
        (self._teacher,) = Cache(self.folder / CACHE).teachers.values()
        self._teacher.row_shape  # noqa: B018 -- opens the codec, which other readers have none of

    def read(self, rows: Array, out: Array) -> None:
        self._teacher.codes(rows, out=out, verify=self.verify, threads=self.threads)


class ZarrOneByOne(Reader):
    def open(self) -> None:
        import zarr

        self._rows: Any = zarr.open_array(_array(self.folder), mode="r")

    def read(self, rows: Array, out: Array) -> None:
        for number, row in enumerate(rows.tolist()):
            out[number] = self._rows[0, row]


class ZarrFancy(ZarrOneByOne):
    def read(self, rows: Array, out: Array) -> None:
        out[:] = self._rows.oindex[0, rows]


class ZarrsPipeline(ZarrOneByOne):
    def open(self) -> None:
        import zarr

        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
        super().open()


class Tensorstore(Reader):
    """At its best: one vectorised read, written into the caller's buffer, a cache that keeps the shards' indexes."""

    def open(self) -> None:
        import tensorstore

        self._library = tensorstore
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{_array(self.folder)}/"},
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
        }
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 32 << 20}})
        self._rows = tensorstore.open(spec, context=context, read=True, open=True).result()[0]

    def read(self, rows: Array, out: Array) -> None:
        self._library.array(out).write(self._rows[rows]).result()


class LitData(Reader):
    """Rows as bytes: its own NumPy type deserialises a whole chunk for one row, and is a tenth as fast."""

    def open(self) -> None:
        import litdata

        self._rows = litdata.StreamingDataset(str(self.folder / "litdata"), shuffle=False, drop_last=False)

    def read(self, rows: Array, out: Array) -> None:
        for number, row in enumerate(rows.tolist()):
            out[number] = np.frombuffer(self._rows[row], out.dtype).reshape(out.shape[1:])


class MosaicStreaming(Reader):
    def open(self) -> None:
        import streaming

        # It refuses a second reader of one local path.
        self._own = tempfile.TemporaryDirectory()
        local = Path(self._own.name) / "mds"
        local.symlink_to(self.folder / "mds")
        self._rows = streaming.StreamingDataset(local=str(local), remote=None, batch_size=32, shuffle=False)

    def read(self, rows: Array, out: Array) -> None:
        for number, row in enumerate(rows.tolist()):
            out[number] = self._rows[row]["row"]


class WebDatasetStream(Reader):
    """Its own shuffled stream, since tars have no random access: shards shuffled, a buffer of 256 rows."""

    random_access = False

    def open(self) -> None:
        webdataset: Any = importlib.import_module("webdataset")
        tars = sorted(str(path) for path in (self.folder / "tars").glob("*.tar"))
        self._stream = webdataset.WebDataset(tars, shardshuffle=len(tars), empty_check=False).shuffle(256, initial=64)
        self._samples = self._endless()

    def read(self, rows: Array, out: Array) -> None:
        for number in range(len(rows)):
            out[number] = np.load(io.BytesIO(next(self._samples)["npy"]))

    def _endless(self) -> Iterator[Any]:
        while True:
            yield from self._stream


def _ours(verify: Verify, threads: int) -> Callable[[Path, Layout], Reader]:
    return partial(_open_ours, verify, threads)


def _open_ours(verify: Verify, threads: int, folder: Path, layout: Layout) -> Reader:
    reader = OurCache(folder, layout)
    reader.verify, reader.threads = verify, threads
    return reader


@dataclass(frozen=True)
class Peer:
    """open: its reader. files: what it reads, below the folder. needs: a package that must be installed.

    starts_alone: nothing else may start meanwhile (it waits for others through shared memory).
    """

    open: Callable[[Path, Layout], Reader]
    files: str
    needs: str | None = None
    starts_alone: bool = False

    @property
    def installed(self) -> bool:
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


PREAD = "pread of one raw file"
PREAD_8 = "pread of one raw file, 8 threads"
MEMMAP = "np.memmap, copied"
OURS = "radio-cache, unverified"
OURS_CHECKED = "radio-cache, verified"
OURS_2 = "radio-cache, unverified, 2 threads"
OURS_CHECKED_2 = "radio-cache, verified, 2 threads"
OURS_8 = "radio-cache, unverified, 8 threads"
OURS_CHECKED_8 = "radio-cache, verified, 8 threads"
NPY, ONE_BY_ONE, FANCY = "one .npy per image", "zarr-python, one by one", "zarr-python, fancy indexing"
TENSORSTORE, LITDATA, MOSAIC = "tensorstore", "LitData (bytes)", "MosaicML streaming"

PEERS: dict[str, Peer] = {
    PREAD: Peer(Pread, RAW),
    PREAD_8: Peer(PreadInThreads, RAW),
    MEMMAP: Peer(Memmap, RAW),
    OURS: Peer(_ours("never", 1), CACHE),
    OURS_CHECKED: Peer(_ours("always", 1), CACHE),
    OURS_2: Peer(_ours("never", 2), CACHE),
    OURS_CHECKED_2: Peer(_ours("always", 2), CACHE),
    OURS_8: Peer(_ours("never", 8), CACHE),
    OURS_CHECKED_8: Peer(_ours("always", 8), CACHE),
    NPY: Peer(NpyFiles, "npy"),
    "HDF5": Peer(Hdf5, "rows.h5", "h5py"),
    ONE_BY_ONE: Peer(ZarrOneByOne, CACHE, "zarr"),
    FANCY: Peer(ZarrFancy, CACHE, "zarr"),
    "zarrs pipeline, one by one": Peer(ZarrsPipeline, CACHE, "zarrs"),
    TENSORSTORE: Peer(Tensorstore, CACHE, "tensorstore"),
    LITDATA: Peer(LitData, "litdata", "litdata"),
    MOSAIC: Peer(MosaicStreaming, "mds", "streaming", starts_alone=True),
    "WebDataset stream": Peer(WebDatasetStream, "tars", "webdataset"),
}


def write_everywhere(folder: Path, rows: Rows) -> None:
    """The same rows below `folder` for every peer that is installed."""
    write_raw(folder / RAW, rows)
    write_cache(folder / CACHE, rows)
    wanted = {peer.files for peer in PEERS.values() if peer.installed}
    for name, write in WRITERS.items():
        if name in wanted:
            write(folder / name, rows)


def write_raw(path: Path, rows: Rows) -> None:
    # In pieces as large as our shards are written: the page cache keeps small writes in small pages, and reads of those
    # are slower, which would flatter everybody else.
    with path.open("wb", buffering=0) as file:
        for first in range(0, rows.num_rows, SHARD_IMAGES):
            file.write(b"".join(rows[row].tobytes() for row in range(first, min(first + SHARD_IMAGES, rows.num_rows))))


def write_cache(path: Path, rows: Rows, *, fsync: bool = False) -> None:
    """A cache without images, whose one teacher has these codes."""
    storage = LocalStorage(path, fsync=fsync)
    meta = CacheMeta(
        num_images=rows.num_rows,
        shard_images=SHARD_IMAGES,
        creator="benchmarks/storage.py",
        class_names=(),
        max_pixels=1,
        containers=(Container(kind="folder", path="none", prefix=""),),
    )
    none = np.full(rows.num_rows, -1, np.int64)
    keys = [f"{row:08d}.png" for row in range(rows.num_rows)]
    index = ImageIndex(keys, none.astype(np.int32), np.zeros(rows.num_rows, np.int32), none, none)
    meta = create_cache(storage, meta, index)
    add_teacher(storage, meta, rows.spec, rows.codec)
    for shard in range(meta.num_shards):
        write_shard(storage, meta, shard, rows)


def write_shard(storage: LocalStorage, meta: CacheMeta, shard: int, rows: Rows) -> None:
    writer = ShardWriter(storage, rows.spec.name, shard)
    held = meta.shard_rows(shard)
    grid = (0, shard, *(0 for _ in rows.distinct.shape[1:]))
    writer.write_sharded(
        "spatial",
        [rows[row] for row in held],
        grid=grid,
        chunks_per_shard=meta.shard_images,
        zstd_level=rows.codec.zstd_level,
    )
    writer.commit({"first_row": held[0], "num_rows": len(held), "num_tokens": 0, "failures": ()})


def _write_npy(folder: Path, rows: Rows) -> None:
    folder.mkdir()
    for row in range(rows.num_rows):
        np.save(folder / f"{row:07d}.npy", rows[row])


def _write_hdf5(path: Path, rows: Rows) -> None:
    import h5py

    shape = rows.distinct.shape[1:]
    with h5py.File(path, "w") as file:
        stored = file.create_dataset("rows", (rows.num_rows, *shape), rows.distinct.dtype, chunks=(1, *shape))
        for row in range(rows.num_rows):
            stored[row] = rows[row]


def _write_litdata(folder: Path, rows: Rows) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes=SHARD_BYTES)
    for row in range(rows.num_rows):
        writer[row] = rows[row].tobytes()
    writer.done()
    writer.merge(1)


def _write_mds(folder: Path, rows: Rows) -> None:
    from streaming import MDSWriter

    shape = ",".join(map(str, rows.distinct.shape[1:]))
    columns = {"row": f"ndarray:{rows.distinct.dtype.name}:{shape}"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=SHARD_BYTES) as writer:
        for row in range(rows.num_rows):
            writer.write({"row": rows[row]})


def _write_tars(folder: Path, rows: Rows) -> None:
    webdataset: Any = importlib.import_module("webdataset")
    folder.mkdir()
    for first in range(0, rows.num_rows, SHARD_IMAGES):
        with webdataset.TarWriter(str(folder / f"{first:07d}.tar")) as tar:
            for row in range(first, min(first + SHARD_IMAGES, rows.num_rows)):
                tar.write({"__key__": f"{row:07d}", "npy": rows[row]})


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    "npy": _write_npy,
    "rows.h5": _write_hdf5,
    "litdata": _write_litdata,
    "mds": _write_mds,
    "tars": _write_tars,
}


def write_with_zarr(path: Path, rows: Rows) -> None:
    """zarr-python's own writing of the same array: shards, inner chunks of one row with a crc32c."""
    import zarr
    from zarr.codecs import Crc32cCodec

    shape = rows.distinct.shape[1:]
    array: Any = zarr.create_array(
        str(path),
        shape=(rows.num_rows, *shape),
        dtype=rows.distinct.dtype,
        chunks=(1, *shape),
        shards=(SHARD_IMAGES, *shape),
        compressors=[Crc32cCodec()],
        filters=None,
    )
    for first in range(0, rows.num_rows, SHARD_IMAGES):
        last = min(first + SHARD_IMAGES, rows.num_rows)
        array[first:last] = np.stack([rows[row] for row in range(first, last)])


def drop_from_page_cache(path: Path) -> None:
    """Make the next read of these files come from the disk."""
    for file in _files(path):
        descriptor = os.open(file, os.O_RDONLY)
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _files(path: Path) -> Iterator[Path]:
    return (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else iter([path])


def _array(folder: Path) -> str:
    (teacher,) = (path for path in (folder / CACHE / "teachers").iterdir() if path.is_dir())
    return str(teacher / "spatial")
