"""The store beside its peers: reading, delivering and writing rows of teacher maps. Same rows, one run, interleaved.

    python benchmarks/storage.py [--folder DIR] [--out benchmarks/results] [--only warm cold delivered zstd write]

Rows are maps of the three usual teachers, in half precision (`half`) and as packed klt codes (`packed`). A random batch
of 32 is read into one buffer that the caller owns, by each reader in its own process, in turns of a fraction of a second,
in shuffled order, round after round; figures are medians of rounds, as rates and as ratios to `pread` of one raw file in
the same run. `--folder` should lie on the disk in question and have 25 GB free. Peers that are not installed are named
and left out (pip install h5py litdata webdataset tensorstore zarrs; mosaicml-streaming asks for an older NumPy than ours and
runs with this one: pip install --no-deps mosaicml-streaming brotli python-snappy xxhash cramjam zstd catalogue, and
transformers).
Exits with 1 if a bar is missed.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from dataclasses import replace as replaced
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import storage_peers as peers
import zstandard
from numpy.typing import NDArray
from storage_peers import PEERS, Layout, Reader, Rows
from storage_report import BATCHES, COLLATE, LIBRARY, LIBRARY_READ, RING, RING_COPYING, Figure, keep, write_report

from radio_cache.codecs.calibrate import CodecRequest, calibrate
from radio_cache.prefetch.buffers import BufferRing
from radio_cache.reader import Cache
from radio_cache.shards import native as native_batch
from radio_cache.statistics.hadamard import hadamard
from radio_cache.statistics.moments import Moments
from radio_cache.testing import fake_spec

BATCH = 32
DISTINCT = 32
MAPS = {"dinov2-g": (16, 16, 1536), "clip-h": (27, 27, 1280), "sam-h": (64, 64, 256)}
CODECS = {
    "half": CodecRequest(name="half"),
    "packed": CodecRequest(name="klt", packing="packed", fidelity=0.99),
    "zstd": CodecRequest(name="klt", packing="zstd", fidelity=0.99),
}
PARTS = ("warm", "cold", "delivered", "zstd", "write")
COLD_ROWS = 256
COLD_PEERS = (
    peers.PREAD,
    peers.PREAD_8,
    peers.MEMMAP,
    peers.OURS_8,
    peers.OURS_CHECKED_8,
    peers.NPY,
    "HDF5",
    peers.ONE_BY_ONE,
    peers.TENSORSTORE,
    peers.LITDATA,
    peers.MOSAIC,
)
_NOT_WARM = (peers.PREAD_8, peers.OURS_8, peers.OURS_CHECKED_8)
_ONE_PROCESS = (peers.OURS_2, peers.OURS_CHECKED_2, peers.FANCY, peers.MOSAIC)
"""Not measured in two processes: they use both cores already, are too slow to wait for, or cannot."""


def make_rows(map_name: str, codec_name: str, num_rows: int) -> Rows:
    """Correlated channels, loud and quiet tokens: packed klt takes 3.5 bits a value of them, as of real maps."""
    h, w, c = MAPS[map_name]
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, c + 1) ** -0.25
    mixing = (spectrum[:, None] * hadamard(c)).astype(np.float32)
    gains = rng.lognormal(0, 0.3, (DISTINCT, h, w, 1)).astype(np.float32)
    features = gains * (rng.standard_normal((DISTINCT, h, w, c), dtype=np.float32) @ mixing) * 20
    tokens = features.reshape(-1, c)[:: max(1, DISTINCT * h * w // 20000)]
    codec = calibrate(CODECS[codec_name], Moments.of(tokens), tokens[::2], tokens[1::2]).codec
    encoded = np.stack([codec.encode(features[number]) for number in range(DISTINCT)])
    spec = replaced(fake_spec(map_name, summary_dim=None, spatial_dim=c, size=8 * h, patch=8), codec=codec.to_json())
    return Rows(distinct=encoded, num_rows=num_rows, spec=spec, codec=codec)


@dataclass(frozen=True)
class Plan:
    """How much is measured. seconds: of one turn."""

    rounds: int
    seconds: float
    num_bytes: int
    min_rows: int


# --- processes that take turns


Measured = Callable[[float], tuple[int, float]]
"""Work for some seconds; returns rows done and seconds taken."""


def repeated(read: Callable[[], object]) -> Measured:
    """Batch after batch, until the time is over."""

    def measured(seconds: float) -> tuple[int, float]:
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            read()
            count += BATCH
        return count, time.perf_counter() - started

    return measured


class Turns:
    """A process that measures when told to and sleeps otherwise. It begins at once; `ready` waits for it."""

    def __init__(self, make: Callable[..., Measured], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args))
        self._process.start()
        self._ready = False

    def ready(self) -> None:
        """Wait until it can measure."""
        if not self._ready:
            self._ready = self._get()

    def start(self, seconds: float) -> None:
        self._pipe.send(seconds)

    def rate(self) -> float:
        count, taken = self._get()
        return count / taken

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send(None)
        self._process.join(20)
        if self._process.is_alive():
            self._process.terminate()

    def _get(self) -> Any:
        answer = self._pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)  # noqa: TRY004 -- it is the other process that failed
        return answer


def _serve(pipe: Connection, make: Callable[..., Measured], args: tuple[Any, ...]) -> None:
    try:
        measured = make(*args)
        pipe.send(True)
        while (seconds := pipe.recv()) is not None:
            pipe.send(measured(seconds))
    except BaseException:
        pipe.send(traceback.format_exc())
    finally:
        os._exit(0)  # peers leave threads behind that would not end


def interleaved(runs: Mapping[str, Iterable[Turns]], plan: Plan) -> dict[str, float]:
    """Median rates over rounds; several processes of a run measure at the same time, and add up."""
    for turn in (turn for run in runs.values() for turn in run):
        turn.ready()
    rates: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    shuffler = random.Random(0)
    for number in range(plan.rounds + 1):
        shuffler.shuffle(order)
        for name in order:
            for turn in runs[name]:
                turn.start(plan.seconds)
            together = sum(turn.rate() for turn in runs[name])
            if number:  # the first round warms up
                rates[name].append(together)
    return {name: statistics.median(values) for name, values in rates.items()}


# --- reading


def random_batches(name: str, folder: Path, layout: Layout, seed: int) -> Measured:
    """Made in the reader's process; the first batch is compared with the raw file."""
    reader = PEERS[name].open(folder, layout)
    rng = np.random.default_rng(seed)
    out = peers.buffer_for(BATCH, layout)
    _compare(reader, folder, rng, out)

    return repeated(lambda: reader.read(rng.integers(0, layout.num_rows, BATCH), out))


def distinct_batches(name: str, folder: Path, layout: Layout, seed: int) -> Measured:
    """One pass over COLD_ROWS different rows, with nothing of the files in memory before it."""

    def measured(_: float) -> tuple[int, float]:
        rows = np.random.default_rng(seed).permutation(layout.num_rows)[:COLD_ROWS]
        out = peers.buffer_for(BATCH, layout)
        reader = PEERS[name].open(folder, layout)
        peers.drop_from_page_cache(folder / PEERS[name].files)
        started = time.perf_counter()
        for first in range(0, len(rows), BATCH):
            reader.read(rows[first : first + BATCH], out)
        return len(rows), time.perf_counter() - started

    return measured


def _compare(reader: Reader, folder: Path, rng: np.random.Generator, out: NDArray[Any]) -> None:
    rows = rng.integers(0, reader.layout.num_rows, BATCH)
    reader.read(rows, out)
    if not reader.random_access:
        return
    truth = peers.Memmap(folder, reader.layout)
    expected = np.empty_like(out)
    truth.read(rows, expected)
    if out.tobytes() != expected.tobytes():
        raise RuntimeError(f"{type(reader).__name__} reads something else than was written")


def warm(folder: Path, layout: Layout, plan: Plan) -> list[tuple[str, str, float]]:
    names = [name for name, peer in PEERS.items() if peer.installed and name not in _NOT_WARM]
    pairs: dict[str, list[Turns]] = {}
    for name in names:
        pairs[name] = [Turns(random_batches, name, folder, layout, seed) for seed in range(_processes(name))]
        for turn in pairs[name] if PEERS[name].starts_alone else []:
            turn.ready()
    try:
        rates = interleaved({name: pair[:1] for name, pair in pairs.items()}, plan)
        two = interleaved({name: pair for name, pair in pairs.items() if name not in _ONE_PROCESS}, plan)
    finally:
        for turn in (turn for pair in pairs.values() for turn in pair):
            turn.close()
    figures = [("warm, 1 process", name, rate) for name, rate in rates.items()]
    return figures + [("warm, 2 processes", name, rate) for name, rate in two.items()]


def _processes(name: str) -> int:
    return 1 if name in _ONE_PROCESS else 2


def cold(folder: Path, layout: Layout, plan: Plan) -> list[tuple[str, str, float]]:
    names = [name for name in COLD_PEERS if PEERS[name].installed]
    rates: dict[str, list[float]] = {name: [] for name in names}
    for number in range(min(plan.rounds, 5)):
        for name in names:
            turn = Turns(distinct_batches, name, folder, layout, number)
            turn.ready()
            turn.start(0)
            rates[name].append(turn.rate())
            turn.close()
    return [("cold", name, statistics.median(values)) for name, values in rates.items()]


# --- delivering to the process that trains


_HEAD_START = 8
"""Batches taken before time is: what was fetched ahead while others had their turn is not counted."""


class _BatchesOfRows:
    """What a DataLoader is given: an item is a row, or, with lists of rows, a batch."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._teacher: Any = None

    def __getitem__(self, rows: int | list[int]) -> NDArray[Any]:
        if self._teacher is None:
            (self._teacher,) = Cache(self._cache).teachers.values()
        if isinstance(rows, int):
            return self._teacher.codes([rows])[0]
        return self._teacher.codes(rows)


def delivered_batches(name: str, folder: Path, layout: Layout) -> Measured:
    """Batches as the training process gets them."""
    batches = _EndlessBatches(layout.num_rows)
    if name in (RING, RING_COPYING):
        (teacher,) = Cache(folder / peers.CACHE).teachers.values()
        raw = peers.Pread(folder, layout)

        def fill(rows: list[int], out: NDArray[Any]) -> NDArray[Any]:
            return teacher.codes(rows, out=out)

        def fill_copying(rows: list[int], out: NDArray[Any]) -> NDArray[Any]:
            raw.read(np.array(rows), out)
            return out

        # No deeper than it has threads: what the processor's cache can hold is copied to faster.
        filled = fill if name == RING else fill_copying
        ring = BufferRing(batches, filled, lambda: peers.buffer_for(BATCH, layout), depth=2, threads=2)
        stream: Any = ring.__enter__()
    else:
        import torch
        from torch.utils.data import DataLoader

        rows = _BatchesOfRows(folder / peers.CACHE)
        torch.set_num_threads(1)
        if name == BATCHES:
            loader: Any = DataLoader(rows, sampler=batches, batch_size=None, num_workers=2)
        else:
            loader = DataLoader(rows, batch_sampler=batches, num_workers=2)
        stream = iter(loader)

    take = repeated(lambda: next(stream))

    def measured(seconds: float) -> tuple[int, float]:
        for _ in range(_HEAD_START):
            next(stream)
        return take(seconds)

    return measured


class _EndlessBatches:
    """Random batches for ever; iterable from the start in every process."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows

    def __iter__(self) -> Any:
        rng = np.random.default_rng(0)
        while True:
            yield rng.integers(0, self._num_rows, BATCH).tolist()


def delivered(folder: Path, layout: Layout, plan: Plan) -> list[tuple[str, str, float]]:
    runs = {name: [Turns(delivered_batches, name, folder, layout)] for name in (RING, RING_COPYING, BATCHES, COLLATE)}
    try:
        rates = interleaved(runs, replaced(plan, seconds=2 * plan.seconds))
    finally:
        for (turn,) in runs.values():
            turn.close()
    return [("delivered", name, rate) for name, rate in rates.items()]


# --- zstd


OUR_ZSTD = "radio-cache, verified"


def decoded_batches(name: str, folder: Path, layout: Layout, threads: int) -> Measured:
    """The library alone decodes chunks that lie in memory and throws each away; or, what nobody can do without, reads a chunk
    and decodes it into the batch's buffer, which is too large for the processor's cache. We check it too."""
    rng = np.random.default_rng(1)
    out = peers.buffer_for(BATCH, layout)
    if name == OUR_ZSTD:
        (teacher,) = Cache(folder / peers.CACHE).teachers.values()
        return repeated(lambda: teacher.codes(rng.integers(0, layout.num_rows, BATCH), out=out, threads=threads))
    files = [folder / f"chunk{number}" for number in range(DISTINCT)]
    frames = [file.read_bytes() for file in files]
    descriptors = [os.open(file, os.O_RDONLY) for file in files]
    rows, own, pool = out.reshape(BATCH, -1).view(np.uint8), threading.local(), ThreadPoolExecutor(threads)

    def decode(number: int, distinct: int) -> int:
        if not hasattr(own, "decompressor"):
            own.decompressor = zstandard.ZstdDecompressor()
            own.frame = bytearray(max(map(len, frames)))
        if name == LIBRARY:
            return len(own.decompressor.decompress(frames[distinct]))
        length = os.preadv(descriptors[distinct], [own.frame], 0)
        return own.decompressor.stream_reader(memoryview(own.frame)[:length]).readinto(rows[number])

    def read() -> None:
        wanted = (rng.integers(0, layout.num_rows, BATCH) % DISTINCT).tolist()
        for _ in (pool.map if threads > 1 else map)(decode, range(BATCH), wanted):
            pass

    return repeated(read)


def zstd(folder: Path, rows: Rows, plan: Plan) -> list[tuple[str, str, float]]:
    peers.write_cache(folder / peers.CACHE, rows)
    compressor = zstandard.ZstdCompressor(level=rows.codec.zstd_level or 3)
    for number, row in enumerate(rows.distinct):
        (folder / f"chunk{number}").write_bytes(compressor.compress(row.tobytes()))
    layout = layout_of(rows)
    figures: list[tuple[str, str, float]] = []
    for threads in (1, 2):
        runs = {
            name: [Turns(decoded_batches, name, folder, layout, threads)] for name in (LIBRARY, LIBRARY_READ, OUR_ZSTD)
        }
        try:
            rates = interleaved(runs, replaced(plan, rounds=plan.rounds + 4))  # few readers: rounds are cheap
        finally:
            for (turn,) in runs.values():
                turn.close()
        figures += [(f"zstd, {threads} thread{'s'[: threads - 1]}", name, rate) for name, rate in rates.items()]
    return figures


# --- writing


OUR_WRITER, OUR_SYNCED, ZARR_WRITER = "radio-cache, unsynced", "radio-cache, synced", "zarr-python, unsynced"


def write(folder: Path, rows: Rows, plan: Plan) -> list[tuple[str, str, float]]:
    """Rows of four shards in memory, to files."""
    rows = replaced(rows, num_rows=4 * peers.SHARD_IMAGES)
    ways: dict[str, tuple[str, Callable[[Path], None]]] = {
        OUR_WRITER: (peers.CACHE, lambda path: peers.write_cache(path, rows)),
        OUR_SYNCED: ("synced.zarr", lambda path: peers.write_cache(path, rows, fsync=True)),
        ZARR_WRITER: ("zarr.zarr", lambda path: peers.write_with_zarr(path, rows)),
    }
    ways |= {
        f"{peer}, unsynced": (
            peers.PEERS[peer].files,
            lambda path, own=peers.WRITERS[peers.PEERS[peer].files]: own(path, rows),
        )
        for peer in (peers.NPY, "HDF5", peers.LITDATA, peers.MOSAIC)
        if peers.PEERS[peer].installed
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(min(plan.rounds, 5) + 1):
        for name, (file, run) in ways.items():
            os.sync()  # of what the last one left unwritten
            started = time.perf_counter()
            run(folder / file)
            if number:
                rates[name].append(rows.num_rows / (time.perf_counter() - started))
            peers.remove(folder / file)
    return [("write", name, statistics.median(values)) for name, values in rates.items()]


# --- all of it


def layout_of(rows: Rows) -> Layout:
    return Layout(rows.num_rows, rows.distinct.shape[1:], rows.distinct.dtype.name)


def measure(map_name: str, codec_name: str, parts: set[str], base: Path, plan: Plan) -> list[Figure]:
    """Everything about one kind of rows, in a folder of its own that is removed again."""
    rows = make_rows(map_name, codec_name, 0)
    rows = replaced(rows, num_rows=max(plan.min_rows, plan.num_bytes // rows.row_bytes))
    layout = layout_of(rows)
    figures: list[tuple[str, str, float]] = []
    with tempfile.TemporaryDirectory(dir=base, prefix="storage-") as name:
        folder = Path(name)
        if codec_name == "zstd":
            figures += zstd(folder, rows, plan)
        else:
            if parts & {"warm", "cold", "delivered"}:
                peers.write_everywhere(folder, rows)
                os.sync()  # so that nothing is written back while others are measured
            if "warm" in parts:
                figures += warm(folder, layout, plan)
            if "delivered" in parts:
                figures += delivered(folder, layout, plan)
            if "cold" in parts:
                figures += cold(folder, layout, plan)
            for file in {peer.files for peer in PEERS.values()}:
                peers.remove(folder / file)
            if "write" in parts and codec_name == "half":
                figures += write(folder, rows, plan)
    return [
        Figure(rows=f"{map_name} {codec_name}", part=part, name=name, per_second=rate, row_bytes=rows.row_bytes)
        for part, name, rate in figures
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, help="Where files are written. [default: the folder for temporary files]"
    )
    parser.add_argument("--out", type=Path, help="Folder for the result: Markdown, JSON, picture.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--maps", nargs="+", choices=MAPS, default=list(MAPS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.35, help="Of one turn.")
    parser.add_argument("--megabytes", type=int, default=512, help="Of one kind of rows.")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    parts = set(args.only)
    absent = [name for name, peer in PEERS.items() if not peer.installed]
    if absent:
        print("not installed, and left out: " + ", ".join(absent))
    if not native_batch.AVAILABLE:
        print("the compiled reader is not there, or of before an update (pip install -e .): this measures Python's")
    plan = Plan(rounds=args.rounds, seconds=args.seconds, num_bytes=args.megabytes << 20, min_rows=2 * COLD_ROWS)
    figures: list[Figure] = []
    for map_name in args.maps:
        for codec_name in CODECS:
            if parts & ({"zstd"} if codec_name == "zstd" else set(PARTS) - {"zstd"}):
                started = time.perf_counter()
                figures += measure(map_name, codec_name, parts, args.folder or Path(tempfile.gettempdir()), plan)
                print(f"{map_name} {codec_name}: {time.perf_counter() - started:.0f} s", flush=True)
                if args.out:  # what was measured is kept if the rest is not
                    keep(figures, args.out, json_of={"plan": asdict(plan)})
    missed = write_report(figures, args.out, json_of={"plan": asdict(plan)})
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
