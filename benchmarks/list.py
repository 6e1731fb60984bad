"""How long listing a million files takes, and taking up the list again: `python benchmarks/list.py [FOLDER] [--out FILE]`.

Makes a tree of a million empty files in a thousand class folders, a list file that names them all, a hundred tars and a hundred
Parquet files of as many; in fresh processes lists each and makes the cache's index (everything a build does before it looks at an
image), and opens the finished index again as the same command a second time does; removes it all. Bars: 60 s to list, 5 s to
take up again. Exits with 1 if one is missed.
"""

import argparse
import datetime
import io
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

MEASURE = """
import sys, time
started = time.perf_counter()
from cache_builder.sources import ListingRequest, Selection, list_for, record_listing
from radio_cache import Cache, CacheMeta
from radio_cache.reader import is_cache
from radio_cache.writer import create_cache

place, source, seed = sys.argv[1:]
request = ListingRequest(sources=(source,), selection=Selection(shuffle_seed=int(seed) if seed else None))
there = Cache(place) if is_cache(place) else None
listing = list_for(request, there)
listed = time.perf_counter()
if there is None:
    meta = CacheMeta(
        num_images=len(listing.index), shard_images=128, creator="benchmarks/list.py", containers=listing.containers,
        class_names=listing.class_names, max_pixels=10**8,
    )
    create_cache(place, meta, listing.index)
    record_listing(Cache(place), request, listing)
cache = Cache(place)
assert len(cache.index) == cache.num_images and cache.index.key(cache.num_images - 1)
done = time.perf_counter()
peak = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]
print(cache.num_images, listing.from_cache, listed - started, done - started, int(peak) / 1e3)
"""
FOLDERS = 1000
SHARDS = 100
MAX_LIST_S, MAX_AGAIN_S = 60.0, 5.0


def make_tree(root: Path, images: int) -> None:
    """Empty files n00000000/n00000000_0.JPEG ..., and beside their folder a list of them. Old, as sources mostly are."""
    with (root / "list.txt").open("w") as listed:
        for folder in range(FOLDERS):
            name = f"n{folder:08d}"
            (root / "tree" / name).mkdir(parents=True)
            for number in range(images // FOLDERS):
                path = f"tree/{name}/{name}_{number}.JPEG"
                os.close(os.open(root / path, os.O_CREAT | os.O_WRONLY))
                listed.write(f"{path}\t{name}\n")
            os.utime(root / "tree" / name, (0, 0))
    os.utime(root / "tree", (0, 0))
    os.utime(root / "list.txt", (0, 0))


def make_shards(root: Path, images: int) -> None:
    """Folders tars/ and parquet/ of a hundred files each, all the same: names of images in different shards may be equal."""
    count = images // SHARDS
    for kind in ("tar", "parquet"):
        folder = root / f"{kind}s"
        folder.mkdir()
        first = folder / f"train-000.{kind}"
        if kind == "tar":
            with tarfile.open(first, "w") as tar:
                for number in range(count):
                    name, label = f"n{number % 1000:08d}_{number}", str(number % 1000).encode()
                    tar.addfile(tarfile.TarInfo(f"{name}.jpg"))
                    member = tarfile.TarInfo(f"{name}.cls")
                    member.size = len(label)
                    tar.addfile(member, io.BytesIO(label))
        else:
            rows = [{"bytes": b"x", "path": f"n{number % 1000:08d}_{number}.jpg"} for number in range(count)]
            column = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
            table = pa.table({"image": column, "label": pa.array([number % 1000 for number in range(count)])})
            pq.write_table(table, first, row_group_size=100, compression="none", use_dictionary=["label"])
        os.utime(first, (0, 0))
        for number in range(1, SHARDS):
            shutil.copy2(first, folder / f"train-{number:03d}.{kind}")


def measure(place: Path, source: Path, seed: str) -> tuple[int, bool, float, float, float]:
    """(images, taken up again, seconds until listed, seconds in all, megabytes at most) of a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, place, source, seed], check=True, capture_output=True, text=True
    )
    count, recorded, listed, total, megabytes = done.stdout.split()
    return int(count), recorded == "True", float(listed), float(total), float(megabytes)


def drop_caches() -> bool:
    """Let the system forget folders and files it has in memory, if it lets us."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, help="where the tree goes for a while [default: a temporary one]"
    )
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shards-only", action="store_true", help="only tars and Parquet files")
    parser.add_argument("--out", type=Path, help="write the table there")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="radio-cache-list-", dir=args.folder))
    rows: list[str] = []
    missed = False
    try:
        started = time.perf_counter()
        if not args.shards_only:
            make_tree(root, args.images)
        make_shards(root, args.images)
        print(f"{args.images} images of each kind made in {time.perf_counter() - started:.0f} s", flush=True)
        loose = (
            ("folder, nothing in the system's cache", root / "tree", "", True),
            ("folder", root / "tree", "", False),
            ("folder, shuffled", root / "tree", "0", False),
            ("list with classes", root / "list.txt", "", False),
        )
        shards = (
            ("100 tars, with .cls files", root / "tars", "", False),
            ("100 Parquet files", root / "parquets", "", False),
        )
        for title, source, seed, cold in shards if args.shards_only else (*loose, *shards):
            first: list[tuple[float, float, float]] = []
            again: list[tuple[float, float]] = []
            for number in range(args.repeats):
                place = root / f"{number}.zarr"
                if cold and not drop_caches():
                    title = "folder, after making it (the system's cache cannot be dropped here)"
                _, _, listed, total, megabytes = measure(place, source, seed)
                first.append((listed, total, megabytes))
                if cold:
                    drop_caches()
                count, recorded, _, total, megabytes = measure(place, source, seed)
                if not recorded or count != args.images:
                    sys.exit(f"{title}: {count} images, taken up again: {recorded}")
                again.append((total, megabytes))
                shutil.rmtree(place)
            listed, total, megabytes = (statistics.median(column) for column in zip(*first, strict=True))
            total_again, megabytes_again = (statistics.median(column) for column in zip(*again, strict=True))
            missed = missed or total > MAX_LIST_S or total_again > MAX_AGAIN_S
            rows.append(
                f"| {title} | {listed:.1f} | {total:.1f} | {megabytes:.0f} | {total_again:.2f} | {megabytes_again:.0f} |"
            )
            print(rows[-1], flush=True)
    finally:
        shutil.rmtree(root)
    command = f"python benchmarks/list.py{' --shards-only' if args.shards_only else ''}"
    text = "\n".join(
        [
            f"# Listing {args.images:,} files, {datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}",
            "",
            f"`{command}`, median of {args.repeats}; fresh processes, Python {platform.python_version()}, "
            f"{os.cpu_count()} cores of a {platform.machine()} virtual machine, ext4 on a virtual disk.",
            "",
            "| source | listed, s | with the index written, s | MB | taken up again, s | MB |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"Bars: {MAX_LIST_S:.0f} s and {MAX_AGAIN_S:.0f} s: {'missed' if missed else 'met'}.",
            "",
        ]
    )
    if args.out:
        args.out.write_text(text)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
