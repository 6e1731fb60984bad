"""What an image costs from a Parquet file, by how the file was written, in order and at random: `python benchmarks/parquet.py`.

Packs random bytes of the size of photographs into a tar and into Parquet files of 100 rows a row group, as `datasets` writes
images now (plain, uncompressed) and as pyarrow does by default; reads them through `read_image`, as a build (rows in order)
and a shuffled training do, in fresh processes, files in the system's cache. At random no decoded row group is kept but the last.
For comparison, pyarrow alone: a row group for each image.
"""

import argparse
import datetime
import io
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MEASURE = """
import sys, time
import numpy as np
from cache_builder.sources import list_images
from radio_cache import parquet_images
from radio_cache.images.containers import read_image

place, order, how, most = sys.argv[1:]
started = time.perf_counter()
listing = list_images([place])
listed = time.perf_counter() - started
index, (container,) = listing.index, listing.containers
rows = np.arange(len(index)) if order == "in order" else np.random.default_rng(0).permutation(len(index))
rows = rows[: int(most)]
if how == "ours":
    def read(row):
        return read_image(container, index.key(row), int(index.offset[row]), int(index.length[row]))
else:
    import pyarrow.parquet as pq
    file = pq.ParquetFile(place)
    def read(row):
        group = file.read_row_group(row // 100, columns=["image.bytes"])
        return group["image"].combine_chunks().field("bytes")[row % 100].as_py()
if order == "at random":
    parquet_images._KEPT_BYTES = 1  # as of files much larger than what is kept of them
started = time.perf_counter()
total = sum(len(read(int(row))) for row in rows)
seconds = time.perf_counter() - started
peak = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]
print(len(rows) / seconds, total / seconds / 1e6, listed, int(peak) / 1e3)
"""


def write_sources(folder: Path, count: int) -> None:
    """The same images three times."""
    rng = np.random.default_rng(0)
    images = [rng.bytes(int(rng.integers(60_000, 160_000))) for _ in range(count)]
    with tarfile.open(folder / "images.tar", "w") as tar:
        for number, data in enumerate(images):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    rows = [{"bytes": data, "path": None} for data in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, kind), "label": pa.array(range(count))})
    pq.write_table(table, folder / "plain.parquet", row_group_size=100, compression="none", use_dictionary=["label"])
    pq.write_table(table, folder / "default.parquet", row_group_size=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the table there")
    args = parser.parse_args()
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="radio-cache-parquet-") as place:
        write_sources(Path(place), args.images)
        for name, how, order in (
            ("images.tar", "ours", "in order"),
            ("images.tar", "ours", "at random"),
            ("plain.parquet", "ours", "in order"),
            ("plain.parquet", "ours", "at random"),
            ("plain.parquet", "pyarrow", "at random"),
            ("default.parquet", "ours", "in order"),
            ("default.parquet", "ours", "at random"),
            ("default.parquet", "pyarrow", "at random"),
        ):
            slow = order == "at random" and (how == "pyarrow" or name.startswith("default"))
            command = [
                sys.executable,
                "-c",
                MEASURE,
                f"{place}/{name}",
                order,
                how,
                "150" if slow else str(args.images),
            ]
            runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(args.repeats)]
            timings = [[float(number) for number in run.stdout.split()] for run in runs]
            rate, megabytes, listed, peak = (statistics.median(column) for column in zip(*timings, strict=True))
            lines.append(
                f"| {name} | {how} | {order} | {rate:,.0f} | {megabytes:,.0f} | {listed * 1e3:.0f} | {peak:.0f} |"
            )
            print(lines[-1], flush=True)
    machine = f"{os.cpu_count()} cores of a {platform.machine()} virtual machine"
    text = "\n".join(
        [
            f"# Images from Parquet, {datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}",
            "",
            f"`python benchmarks/parquet.py`, median of {args.repeats}; {args.images} images of 110 kB, one thread, Python "
            f"{platform.python_version()}, pyarrow {pa.__version__}, {machine}, files in the system's cache. At random no "
            "decoded row group is kept but the last, as of files much larger than what is kept.",
            "",
            "| file | read by | order | images/s | MB/s | listed, ms | MB of memory |",
            "|---|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    )
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
