"""Kills writers of a small cache a thousand times, wherever they are, and looks at what is left.

    python benchmarks/faults/kill_cycles.py [--cycles 1000] [--seed 0]

A life of the cache has four parts: it is built; it grows; some of its shards are dropped, as `repair` does, and made again;
a teacher is dropped and made again. Receipts compact in between. Each cycle forks a writer that goes on where the last one
was killed, over all that it left behind, and one cycle in four forks two of them, which write the same shards; SIGKILL comes
a random moment after a random number of changes to the disk. Then the cache is opened, verified deeply, and compared with the
truth bit by bit. Where `verify` finds damage, `repair` must bring the cache to a state that verifies, and the writers that
follow must restore it. A life that is complete ends with the bytes of one that nobody disturbed. Exits with 1 if anything
else was seen.
"""

import argparse
import mmap
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from small_writer import (
    CODECS,
    LENGTHS,
    PHASES,
    SHARD_IMAGES,
    features,
    image_digest,
    index_of,
    size_hw,
    unusable,
    write,
)
from steps import Steps

from radio_cache import Cache
from radio_cache.checks.verify import repair_cache, verify_cache
from radio_cache.format.schema import IMAGES_UNIT
from radio_cache.reader import is_cache
from radio_cache.storage.local import LocalStorage

# ---------------------------------------------------------------- looking at what is left


class Wrong(Exception):
    """What must not be."""


def truth_of(cache: Cache) -> None:
    """Raise Wrong unless everything that receipts vouch for is what it should be, to the last bit."""
    count = cache.num_images
    if list(cache.index.keys) != index_of(count).keys or not np.array_equal(cache.index.labels, np.arange(count) % 2):
        raise Wrong("the list of images is another")
    sizes, digests = cache.sizes_hw, cache.digests
    for receipt in cache.receipts(IMAGES_UNIT):
        for row in range(receipt.first_row, receipt.first_row + receipt.num_rows) if receipt else ():
            if tuple(sizes[row]) != size_hw(row) or not np.array_equal(digests[row], image_digest(row)):
                raise Wrong(f"image {row} has another size or digest")
    for name, teacher in cache.teachers.items():
        receipts = [receipt for receipt in cache.receipts(name) if receipt]
        known = {row for receipt in receipts for row in range(receipt.first_row, receipt.first_row + receipt.num_rows)}
        rows = sorted(row for row in known if not unusable(row))
        if [row for row in cache.usable_rows([name]) if row not in known]:
            raise Wrong(f"{name}: rows are called usable that no receipt knows")
        for row, codes in zip(rows, teacher.codes(rows), strict=True):
            if codes.tobytes() != CODECS[name].encode(features(name, row)[0]).tobytes():
                raise Wrong(f"{name}, row {row}: another map")
        if teacher.spec.summary_dim:
            for row, summary in zip(rows, teacher.summaries(rows), strict=True):
                if not np.array_equal(summary, features(name, row)[1].astype(np.float16)):
                    raise Wrong(f"{name}, row {row}: another summary")
        if rows:
            tokens = np.concatenate([features(name, row)[0].reshape(-1, 24) for row in rows]).astype(np.float64)
            if not np.allclose(teacher.spatial_mean_std()[0], tokens.mean(axis=0), rtol=1e-9, atol=1e-12):
                raise Wrong(f"{name}: other statistics")


def finished(place: Path) -> set[tuple[str, int, int]]:
    """(unit, shard, rows) of everything with a receipt."""
    if not is_cache(place):
        return set()
    cache = Cache(place)
    return {
        (unit, receipt.shard, receipt.num_rows)
        for unit in (IMAGES_UNIT, *cache.teachers)
        for receipt in cache.receipts(unit)
        if receipt
    }


def data_files(place: Path) -> dict[str, bytes]:
    """All files but receipts, which may lie in files of their own or in a log; of what is left over none."""
    return {
        path: (place / path).read_bytes()
        for path, _ in LocalStorage(place).list_files()
        if not path.startswith("receipts/")
    }


@dataclass
class Counts:
    steps: Counter[tuple[str, bool]]
    phases: Counter[str]
    outcomes: Counter[str]


def look(place: Path, counts: Counts) -> None:
    """Verify what is left and compare it with the truth; mend it if it needs mending."""
    if not is_cache(place):
        counts.outcomes["no cache yet"] += 1
        return
    cache = Cache(place)
    report = verify_cache(cache, deep=True)
    if report.ok:
        truth_of(cache)
        counts.outcomes["verified, and equal to the truth"] += 1
        return
    counts.outcomes["damage named by verify, mended by repair"] += 1
    repair_cache(cache, report)
    again = verify_cache(Cache(place), deep=True)
    if not again.ok:
        raise Wrong(f"damaged after repair: {again.damages}, before: {report.damages}")
    truth_of(Cache(place))


# ---------------------------------------------------------------- cycles


def start(place: Path, phase: str, steps: Steps) -> int:
    """Fork a writer."""
    steps.clear()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        steps.set("opening the cache")
        steps.follow(place)
        write(place, phase)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def kill(rng: random.Random, writers: dict[int, Steps]) -> dict[int, int]:
    """Kill writers, each after a number of changes of its own; returns their exit codes."""
    # Most see few changes, so that every step of a life is met; some are left to finish.
    after = {child: rng.choice((rng.randrange(60), rng.randrange(60), rng.randrange(600))) for child in writers}
    codes: dict[int, int] = {}
    while len(codes) < len(writers):
        for child in writers.keys() - codes.keys():
            if writers[child].count() >= after[child]:
                wait_until = time.perf_counter() + rng.choice((0, rng.uniform(0, 3e-4), rng.uniform(0, 3e-3)))
                while time.perf_counter() < wait_until:
                    pass
                os.kill(child, signal.SIGKILL)
                codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            else:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[child] = os.waitstatus_to_exitcode(status)
    return codes


def undisturbed(place: Path) -> dict[str, dict[str, bytes]]:
    """The data files after each part of a life that nobody disturbs."""
    files: dict[str, dict[str, bytes]] = {}
    for phase in PHASES:
        write(place, phase)
        files[phase] = data_files(place)
    return files


def cycle(place: Path, phase: str, slots: list[Steps], rng: random.Random, counts: Counts) -> bool:
    """Start writers, kill them, look at what they left; whether one came to the end. Raises Wrong."""
    before = finished(place)
    # Nobody drops a teacher that somebody else is building: that is a mistake, and looks like one.
    two = rng.random() < 0.25 and phase != "drop a teacher"
    writers = {start(place, phase, slot): slot for slot in slots[: 1 + two]}
    codes = kill(rng, writers)
    for child, code in codes.items():
        if code > 0:
            raise Wrong(f"a writer failed with {code}")
        if code < 0:
            counts.steps[writers[child].name() or "nothing yet", two] += 1
            counts.phases[phase] += 1
    look(place, counts)
    dropped = {2} if phase == "repair" else {LENGTHS[0] // SHARD_IMAGES}  # the shard that grows is made again
    lost = {one for one in before - finished(place) if one[1] not in dropped}
    if phase == "drop a teacher":
        lost = {one for one in lost if one[0] != "zstd"}
    if lost:
        raise Wrong(f"finished work was lost: {sorted(lost)}")
    return 0 in codes.values()


def run(folder: Path, cycles: int, seed: int) -> tuple[Counts, str | None]:
    """All cycles; stops at the first that is wrong, and says what is; what it left stays for a look."""
    rng = random.Random(seed)
    counts = Counts(Counter(), Counter(), Counter())
    shared = mmap.mmap(-1, 2 * Steps.SIZE)
    slots = [Steps(shared, number) for number in range(2)]
    place, part, number = folder / "killed.zarr", 0, 0
    expected = undisturbed(folder / "undisturbed.zarr")
    while number < cycles or part:
        phase = PHASES[part]
        try:
            if number < cycles:
                ended = cycle(place, phase, slots, rng, counts)
            else:  # the last life comes to its end, too
                write(place, phase)
                look(place, counts)
                ended = True
            if ended and data_files(place) != expected[phase]:
                raise Wrong("it ended with other bytes than where nobody disturbs it")
        except Exception as exc:
            return counts, f"cycle {number}, '{phase}': {type(exc).__name__}: {exc}"
        if ended:
            counts.outcomes[f"'{phase}' ended with the bytes of an undisturbed one"] += 1
            part = (part + 1) % len(PHASES)
            if part == 0:
                shutil.rmtree(place)
        number += 1
    return counts, None


def report(counts: Counts, cycles: int, seed: int, seconds: float) -> str:
    lines = [f"{cycles} cycles, seed {seed}, {seconds:.0f} s: {counts.phases.total()} writers killed", ""]
    for title, counter in (("what was left", counts.outcomes), ("killed in", counts.phases)):
        lines += [
            f"| {title} | |",
            "|---|---|",
            *(f"| {name} | {count} |" for name, count in counter.most_common()),
            "",
        ]
    lines += ["| killed while | alone | beside another writer |", "|---|---|---|"]
    names = Counter[str]()
    for (name, _), count in counts.steps.items():
        names[name] += count
    lines += [
        f"| {name} | {counts.steps[name, False]} | {counts.steps[name, True]} |" for name, _ in names.most_common()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the cache lies  [default: a temporary folder]")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill-cycles-", dir=arguments.folder))
    started = time.monotonic()
    counts, wrong = run(folder, arguments.cycles, arguments.seed)
    print(f"Python {platform.python_version()}, {platform.system()} {platform.release()}\n")
    print(report(counts, arguments.cycles, arguments.seed, time.monotonic() - started))
    if wrong:
        print(f"\n{wrong}\nleft for a look: {folder}")
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
