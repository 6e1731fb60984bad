"""How long a cache of ten million images takes to open, and how much memory: `python benchmarks/open.py [FOLDER]`.

Its metadata is real and its features are not there: the list of images, and the receipts of the images and of three
teachers, 78,125 each, in logs. Measured is a fresh process that opens the cache, finds the rows that are usable for all
three teachers and reads one image's key. Bars: two seconds, 200 MB. Exits with 1 if one is missed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from radio_cache.format.schema import CacheMeta, Container, Failure, Receipt, StoredFile
from radio_cache.receipts import write_log
from radio_cache.storage.local import LocalStorage
from radio_cache.testing import fake_spec
from radio_cache.writer import ImageIndex, add_teacher, create_cache

MEASURE = """
import time
started = time.perf_counter()
import sys
from radio_cache import Cache
imported = time.perf_counter()
cache = Cache(sys.argv[1])
rows = cache.usable_rows(cache.teachers)
key = cache.index.key(7_654_321 % cache.num_images)
done = time.perf_counter()
status = open("/proc/self/status").read()  # not getrusage, whose peak includes that of the process that started this one
print(len(rows), key, imported - started, done - imported, int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6)
"""
TEACHERS = {"clip": 1280, "dinov2": 1536, "sam": 256}
MAX_SECONDS, MAX_MEGABYTES = 2.0, 200.0


def synthesise(place: Path, num_images: int, shard_images: int = 128) -> CacheMeta:
    """The metadata of a finished cache; one image in a thousand is unusable."""
    storage = LocalStorage(place, fsync=False)
    meta = CacheMeta(
        num_images=num_images,
        shard_images=shard_images,
        creator="benchmarks/open.py",
        class_names=(),
        max_pixels=10**8,
        containers=(Container(kind="folder", path="photos", prefix=""),),
    )
    none = np.full(num_images, -1, np.int64)
    keys = [f"n{row // 1300:08d}/n{row // 1300:08d}_{row % 1300}.JPEG" for row in range(num_images)]
    meta = create_cache(
        storage, meta, ImageIndex(keys, none.astype(np.int32), np.zeros(num_images, np.int32), none, none)
    )
    del keys
    write_log(
        storage, "images", (receipt(meta, "images", shard, ("status", "size_hw", "digest")) for shard in shards(meta))
    )
    for name, width in TEACHERS.items():
        add_teacher(storage, meta, fake_spec(name, summary_dim=None if name == "sam" else width, spatial_dim=width))
        arrays = ("spatial", "stats/spatial", "summary", "stats/summary")
        write_log(storage, name, (receipt(meta, name, shard, arrays) for shard in shards(meta)))
    return meta


def shards(meta: CacheMeta) -> range:
    return range(meta.num_shards)


def receipt(meta: CacheMeta, unit: str, shard: int, arrays: tuple[str, ...]) -> Receipt:
    rows = meta.shard_rows(shard)
    files = tuple(
        StoredFile(path=f"{array}/c/0/{shard}/0/0/0", num_bytes=100_663_296, crc32c=(shard * 2654435761) % 2**32)
        for array in arrays
    )
    failures = tuple(Failure(row=row, reason="the file is empty (0 bytes)") for row in rows if row % 1000 == 999)
    return Receipt(
        unit=unit,
        shard=shard,
        first_row=rows[0],
        num_rows=len(rows),
        num_tokens=256 * len(rows),
        failures=failures,
        files=files,
    )


def measure(place: Path) -> dict[str, float | int | str]:
    out = subprocess.run([sys.executable, "-c", MEASURE, str(place)], capture_output=True, text=True, check=True).stdout
    usable, key, imported, opened, megabytes = out.split()
    return {
        "usable_rows": int(usable),
        "key": key,
        "import_seconds": round(float(imported), 3),
        "open_seconds": round(float(opened), 3),
        "peak_rss_mb": round(float(megabytes), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", type=Path, nargs="?", help="where to make the cache; kept, and used again if it is there"
    )
    parser.add_argument("--images", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = (arguments.folder or Path(temporary)) / f"{arguments.images}.zarr"
        if not place.exists():
            started = time.perf_counter()
            synthesise(place, arguments.images)
            print(f"made {place} in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        measured = [measure(place) for _ in range(arguments.repeats)]
    for run in measured:
        print(json.dumps(run))
    seconds = sorted(float(run["import_seconds"]) + float(run["open_seconds"]) for run in measured)[len(measured) // 2]
    megabytes = max(float(run["peak_rss_mb"]) for run in measured)
    print(
        f"median {seconds:.2f} s with imports (bar {MAX_SECONDS} s), at most {megabytes:.0f} MB (bar {MAX_MEGABYTES:.0f} MB)"
    )
    sys.exit(seconds > MAX_SECONDS or megabytes > MAX_MEGABYTES)


if __name__ == "__main__":
    main()
