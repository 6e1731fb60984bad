"""Builds by worker processes, one of which is killed every so many seconds, against one process: the same bytes?

python benchmarks/faults/cluster_kills.py --images FOLDER [--workers 4] [--every 20] [--result FILE.md]

Real photographs, three real teachers, real SIGKILLs, over and over until at least --kills workers have died in whole
builds; every build must end with the bytes of the one that one process made.
"""

import argparse
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cache_builder.build import BuildConfig, build_cache
from cache_builder.sources.listing_record import LISTING_FILE as LISTING
from cache_builder.teachers import TeacherOptions
from cache_builder.workers.cluster import local_pool
from cache_builder.workers.pool import WorkerPool
from radio_cache import __version__

TEACHERS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")


@dataclass
class Killer:
    """Kills one worker of a pool, at random, every `every_s` seconds, until it is stopped."""

    worker_pool: WorkerPool
    every_s: float
    rng: random.Random
    killed: list[int] = field(default_factory=list[int])
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Killer":
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self.every_s):
            alive = [facts.pid for facts in self.worker_pool.worker_facts() if facts.pid not in self.killed]
            if alive:
                self.killed.append(self.rng.choice(alive))
                os.kill(self.killed[-1], signal.SIGKILL)


def files(cache: Path) -> dict[str, bytes]:
    """Every file but the note of when the sources were changed, which depends on the clock."""
    stored = (file for file in cache.rglob("*") if file.is_file() and file.name != LISTING)
    return {file.relative_to(cache).as_posix(): file.read_bytes() for file in stored}


def config(images: str, out: Path, shard_images: int) -> BuildConfig:
    return BuildConfig(
        images=(images,),
        teachers={name: TeacherOptions() for name in TEACHERS},
        out=out,
        shard_images=shard_images,
        batch_size=16,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between kills")
    parser.add_argument("--kills", type=int, default=5, help="go on until so many workers have died")
    parser.add_argument("--shard-images", type=int, default=16)
    parser.add_argument("--result", type=Path, help="where to write a table")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cluster-kills-"))
    started = time.perf_counter()
    reference = build_cache(config(arguments.images, folder / "one.zarr", arguments.shard_images))
    one_process_s = time.perf_counter() - started
    expected = files(folder / "one.zarr")
    rows, killed = [f"| one process, no kill | {one_process_s:.0f} | - | {len(expected)} | |"], 0
    rng, run = random.Random(0), 0
    while killed < arguments.kills:
        run += 1
        out = folder / f"pool{run}.zarr"
        started = time.perf_counter()
        with (
            local_pool(
                arguments.workers, device="cpu", threads=max(1, (os.cpu_count() or 1) // arguments.workers)
            ) as worker_pool,
            Killer(worker_pool, arguments.every, rng) as killer,
        ):
            build_cache(config(arguments.images, out, arguments.shard_images), worker_pool=worker_pool)
            seconds = time.perf_counter() - started
        stored = files(out)
        differing = sorted(path for path in expected.keys() | stored.keys() if expected.get(path) != stored.get(path))
        killed += len(killer.killed)
        rows.append(
            f"| {arguments.workers} workers, run {run} | {seconds:.0f} | {len(killer.killed)} | "
            f"{len(stored)} | {len(differing)} |"
        )
        print(rows[-1], flush=True)
        if differing:
            sys.exit(f"{out} differs from {folder / 'one.zarr'}: {differing[:10]}")
    shutil.rmtree(folder)
    text = "\n".join(
        [
            f"# Workers killed every {arguments.every:g} s, {time.strftime('%Y-%m-%d')}",
            "",
            f"`python {' '.join(sys.argv)}`: {reference.cache.num_images} photos in shards of {arguments.shard_images}, "
            f"{', '.join(TEACHERS)}. {os.cpu_count()} cores ({platform.machine()}) that other work shared, radio-cache "
            f"{__version__}, PyTorch {torch.__version__}. A worker is a process with Dask, killed by SIGKILL; "
            "Dask's nanny starts it again.",
            "",
            "| build | seconds | workers killed | files | files that differ |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"{killed} workers killed; every file of every build is bit for bit that of the one process.",
            "",
        ]
    )
    print(text)
    if arguments.result:
        arguments.result.write_text(text)


if __name__ == "__main__":
    main()
