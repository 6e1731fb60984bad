"""Random batches of maps: our reader beside zarr-python on the same files, and a plain `pread` of one raw file as the floor.

    python benchmarks/read.py [--images 512] [--shape 16 16 1536] [--rounds 7]

Prints images a second and ratios, from rounds that are interleaved; medians. Page cache warm.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import zarr

import radio_cache
from radio_cache.codecs import Half
from radio_cache.format.schema import CacheMeta, Container
from radio_cache.reader import Cache
from radio_cache.testing import fake_spec
from radio_cache.writer import ImageIndex, ShardWriter, add_teacher, create_cache

BATCH = 32


def make_cache(path: Path, num_images: int, shape: tuple[int, int, int], raw: Path) -> Cache:
    """A cache of random maps, and the same maps one after the other in a raw file."""
    meta = CacheMeta(
        num_images=num_images,
        shard_images=128,
        creator="benchmark",
        class_names=(),
        max_pixels=1,
        containers=(Container(kind="folder", path="none", prefix=""),),
    )
    none = np.full(num_images, -1, np.int64)
    keys = [f"{i}.png" for i in range(num_images)]
    create_cache(path, meta, ImageIndex(keys, none.astype(np.int32), np.zeros(num_images, np.int32), none, none))
    grid, _, width = shape
    add_teacher(path, meta, fake_spec("maps", summary_dim=None, spatial_dim=width, size=8 * grid, patch=8))
    rng = np.random.default_rng(0)
    with raw.open("wb") as file:
        for shard in range(meta.num_shards):
            rows = [Half().encode(rng.standard_normal(shape, dtype=np.float32)) for _ in meta.shard_rows(shard)]
            file.writelines(row.tobytes() for row in rows)
            writer = ShardWriter(path, "maps", shard)
            writer.write_sharded("spatial", rows, grid=(0, shard, 0, 0, 0), chunks_per_shard=meta.shard_images)
            writer.commit({"first_row": 0, "num_rows": len(rows), "num_tokens": 0, "failures": ()})
    return Cache(path)


def rate(read: Callable[[np.ndarray], None], num_images: int, rng: np.random.Generator, seconds: float = 0.4) -> float:
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        read(rng.integers(0, num_images, BATCH))
        count += BATCH
    return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--shape", type=int, nargs=3, default=(16, 16, 1536), metavar=("H", "W", "C"))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    shape = tuple(args.shape)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.bin"
        cache = make_cache(Path(folder) / "cache.zarr", args.images, shape, raw)
        teacher = cache.teachers["maps"]
        array = zarr.open_array(cache.path / "teachers/maps/spatial", mode="r")
        out = np.empty((BATCH, *shape), np.float16)
        num_bytes = out[0].nbytes
        descriptor = os.open(raw, os.O_RDONLY)

        def pread(rows: np.ndarray) -> None:
            for number, row in enumerate(np.sort(rows)):
                os.preadv(descriptor, [memoryview(out[number]).cast("B")], int(row) * num_bytes)

        def zarr_loop(rows: np.ndarray) -> None:
            for number, row in enumerate(rows):
                out[number] = array[0, int(row)]

        readers: dict[str, Callable[[np.ndarray], None]] = {
            "pread of one raw file": pread,
            "radio-cache, checksums verified": lambda rows: teacher.codes(rows, out=out) is None,
            "radio-cache, verified, 2 threads": lambda rows: teacher.codes(rows, out=out, threads=2) is None,
            "radio-cache, not verified": lambda rows: teacher.codes(rows, out=out, verify="never") is None,
            f"zarr-python {zarr.__version__}, one by one": zarr_loop,
        }
        rates: dict[str, list[float]] = {name: [] for name in readers}
        rng = np.random.default_rng(1)
        for _ in range(args.rounds):
            for name, read in readers.items():
                rates[name].append(rate(read, args.images, rng))
        os.close(descriptor)
    floor = statistics.median(rates["pread of one raw file"])
    print(
        f"# {datetime.now(UTC):%Y-%m-%d}, radio-cache {radio_cache.__version__}, {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} cores, batches of {BATCH}, maps {shape} float16, {args.images} images, {args.rounds} rounds"
    )
    print(f"{'reader':40} {'images/s':>10} {'GB/s':>6} {'x pread':>8}")
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:40} {median:10.0f} {median * num_bytes / 1e9:6.2f} {median / floor:8.2f}")


if __name__ == "__main__":
    main()
