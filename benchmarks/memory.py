"""Does a build's memory stay flat? `python benchmarks/memory.py IMAGES [--images 10000] [--out FOLDER]`.

Runs `radio-cache build` on so many images, which repeat under other names where there are fewer, with EfficientNet-Lite0 at a
small size, and looks every half second at its resident memory. Writes the series and a plot. Bar: over the second half of the
images the median is at most 5 % above that of the second quarter (the first holds what is loaded and allocated once).
Exits with 1 if it is missed.
"""

import argparse
import csv
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from matplotlib.figure import Figure

BAR = 1.05
TEACHER = "efficientnet-lite0"


def listed(images: Path, count: int, pool: Path) -> Path:
    """A folder of so many links to images."""
    files = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    pool.mkdir()
    for number in range(count):
        source = files[number % len(files)]
        (pool / f"{number:06d}{source.suffix}").symlink_to(source.resolve())
    return pool


def shards_done(out: Path) -> int:
    receipts = out / "receipts" / TEACHER
    return len(list(receipts.glob("*.json"))) if receipts.is_dir() else 0


def watched(command: list[str], out: Path, every_s: float) -> list[tuple[float, int, float]]:
    """(seconds, shards done, MB resident) of a command while it runs. Raises CalledProcessError if it fails."""
    started = time.perf_counter()
    series: list[tuple[float, int, float]] = []
    done = 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            done = max(done, shards_done(out))  # at the end its receipts become one file
            if match := re.search(r"VmRSS:\s*(\d+)", status):
                series.append((time.perf_counter() - started, done, int(match[1]) / 1024))
            time.sleep(every_s)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return series


def plot(series: list[tuple[float, int, float]], shard_images: int, file: Path) -> None:
    """Memory over images."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([shards * shard_images for _, shards, _ in series], [mb for *_, mb in series], linewidth=1)
    axes.set(xlabel="images done", ylabel="resident MB", ylim=(0, None))
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--images", dest="count", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--shard-images", type=int, default=128)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        out = folder / "cache.zarr"
        pool = str(listed(args.images, args.count, folder / "images"))
        command = [
            sys.executable,
            "-m",
            "cache_builder.cli",
            "build",
            "--images",
            pool,
            "--teacher",
            TEACHER,
            "--size",
            str(args.size),
            "--shard-images",
            str(args.shard_images),
            "--out",
            str(out),
        ]
        series = watched(command, out, 0.5)
    shards = -(-args.count // args.shard_images)
    quarter = [mb for _, done, mb in series if shards // 4 <= done < shards // 2]
    half = [mb for _, done, mb in series if done >= shards // 2]
    ratio = statistics.median(half) / statistics.median(quarter)
    verdict = "met" if ratio <= BAR else "MISSED"
    text = "\n".join(
        [
            f"# Memory of a build over {args.count:,} images, {datetime.now(UTC):%Y-%m-%d}",
            "",
            f"`{' '.join(['python', 'benchmarks/memory.py', *sys.argv[1:]])}`: `radio-cache build` with {TEACHER} "
            f"at {args.size} px, shards of {args.shard_images}; "
            f"{platform.machine()}, {os.cpu_count()} cores; {series[-1][0]:.0f} s.",
            "",
            "| | MB resident |",
            "|---|---|",
            f"| median, second quarter of the images | {statistics.median(quarter):.0f} |",
            f"| median, second half | {statistics.median(half):.0f} |",
            f"| largest, first half | {max(mb for _, done, mb in series if done < shards // 2):.0f} |",
            f"| largest, second half | {max(half):.0f} |",
            "",
            f"Second half over second quarter: {ratio:.3f}, bar {BAR}: {verdict}.",
            "",
        ]
    )
    print(text)
    if args.out:
        stem = args.out / f"{datetime.now(UTC):%Y-%m-%d}-memory"
        plot(series, args.shard_images, stem.with_suffix(".png"))
        stem.with_suffix(".md").write_text(f"{text}\n![resident memory over images]({stem.name}.png)\n")
        with stem.with_suffix(".csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("seconds", "shards", "resident_mb"))
            rows.writerows((f"{seconds:.1f}", done, f"{mb:.0f}") for seconds, done, mb in series)
    sys.exit(verdict == "MISSED")


if __name__ == "__main__":
    main()
