"""Damages a small cache in every way there is, and looks whether it is noticed: `python benchmarks/faults/fuzz.py`.

The cache has a teacher for each codec, a compacted log for some units and receipts of their own for others; it lies in a
folder and in a bucket in memory, in turn. Each case is damaged (`damage.py`), opened, described, read whole with checksums,
and verified deeply. Allowed: what the whole cache says, or a RadioCacheError that names a place in it. Not allowed:

- another exception, a crash, more than 30 seconds, or more than 256 MB;
- after an accident, other values where `verify` finds nothing; other maps even if it does, unless whole files changed places.

A case is a function of the seed and its number: `--first N --cases 1` runs it alone. Exits with 1 if anything failed.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from damage import FOLDER, Changes, Damage, accident, forgery, kind_of_file, two_accidents
from rich.console import Console

from radio_cache import Cache, RadioCacheError
from radio_cache.checks.verify import VerifyReport, verify_cache
from radio_cache.codecs.calibrate import CodecRequest
from radio_cache.errors import ImageError
from radio_cache.receipts import compact_receipts
from radio_cache.storage.base import Storage
from radio_cache.storage.buckets import ObjectStorage
from radio_cache.storage.local import LocalStorage
from radio_cache.testing import make_tiny_cache, write_images
from radio_cache.view.info import describe, describe_failures

SHARD_IMAGES = 4
TEACHERS: dict[str, tuple[int | None, int]] = {"half": (6, 8), "int8": (None, 5), "packed": (4, 20), "zstd": (None, 10)}
CODECS = {
    "int8": CodecRequest(name="int8"),
    "packed": CodecRequest(name="klt", packing="packed"),
    "zstd": CodecRequest(name="klt", packing="zstd"),
}
ROW_BYTES = 2 * 10 * 4 * 4
"""Of a map of `zstd`: two planes of ten channels on a grid of 4 x 4."""
COMPACTED = ("int8", "zstd")
MAX_MEGABYTES, MAX_SECONDS = 256, 30


def make_cache(folder: Path) -> Path:
    """Ten images, one of them unusable, in shards of four."""
    write_images(folder / "photos", per_class=5)
    path = folder / "small.zarr"
    make_tiny_cache(
        path, folder / "photos", shard_images=SHARD_IMAGES, unusable=["red/1.png"], teachers=TEACHERS, codecs=CODECS
    )
    for unit in COMPACTED:
        compact_receipts(path, unit, from_files=1)
    return path


# ---------------------------------------------------------------- reading all there is


def _text(renderable: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=300).print(renderable)
    return out.getvalue()


def readings(rows: list[int], teachers: tuple[str, ...]) -> dict[str, Callable[[Cache], Any]]:
    """Everything a user may ask of a cache, by name."""
    reads: dict[str, Callable[[Cache], Any]] = {
        "info": lambda cache: _text(describe(cache)),
        "failures": lambda cache: _text(describe_failures(cache)),
        "keys": lambda cache: list(cache.index.keys),
        "labels": lambda cache: cache.index.labels,
        "places": lambda cache: [cache.index.container, cache.index.offset, cache.index.length],
        "meta": lambda cache: cache.meta,
        "sizes": lambda cache: cache.sizes_hw,
        "digests": lambda cache: cache.digests,
        "pixels": lambda cache: _pixels(cache, rows[0]),
        "usable rows": lambda cache: cache.usable_rows(teachers),
    }
    for name in teachers:
        reads |= {
            f"{name} spec": lambda cache, name=name: cache.teachers[name].spec,
            f"{name} codes": lambda cache, name=name: cache.teachers[name].codes(rows, verify="always"),
            f"{name} maps": lambda cache, name=name: cache.teachers[name].maps(rows),
            f"{name} statistics": lambda cache, name=name: cache.teachers[name].spatial_mean_std(),
            f"{name} fidelity": lambda cache, name=name: cache.teachers[name].fidelity(),
            f"{name} bytes": lambda cache, name=name: cache.teachers[name].stored_bytes(),
        }
        if TEACHERS[name][0] is not None:
            reads |= {
                f"{name} summaries": lambda cache, name=name: cache.teachers[name].summaries(rows),
                f"{name} summary statistics": lambda cache, name=name: cache.teachers[name].summary_mean_std(),
            }
    return reads


def _pixels(cache: Cache, row: int) -> bytes:
    try:
        return cache.read_file(row)
    except ImageError as exc:  # gives the reason alone, and leaves it to those who ask to say of what
        raise ImageError(f"{cache.url}: {exc}") from exc


def _plain(value: Any) -> Any:
    """Something that compares equal if and only if all bits are."""
    if isinstance(value, np.ndarray):
        return (value.shape, value.dtype.str, value.tobytes())
    if isinstance(value, list | tuple):
        return tuple(_plain(one) for one in value)
    return value


@dataclass
class Seen:
    """What one look at a cache gave: plain values, errors in place of those that were refused, and what verify found."""

    values: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, RadioCacheError] = field(default_factory=dict)
    report: VerifyReport | None = None


def look(storage: Storage, asked: dict[str, Callable[[Cache], Any]]) -> Seen:
    """Open, read, verify. Only errors of ours are caught."""
    seen = Seen()
    try:
        cache = Cache(storage)
    except RadioCacheError as exc:
        seen.errors["open"] = exc
        return seen
    for name, read in asked.items():
        try:
            seen.values[name] = _plain(read(cache))
        except RadioCacheError as exc:
            seen.errors[name] = exc
        except KeyError as exc:  # how a dictionary says that the teacher asked for is not there
            if exc.args[0] not in TEACHERS or exc.args[0] in cache.teachers:
                raise
            seen.errors[name] = RadioCacheError(f"{storage.at(f'teachers/{exc.args[0]}')} is not there")
    try:
        seen.report = verify_cache(cache, deep=True)
    except RadioCacheError as exc:
        seen.errors["verify"] = exc
    return seen


# ---------------------------------------------------------------- judging


class Failed(Exception):
    """Something that must not happen."""


def judge(damage: Damage, seen: Seen, truth: Seen, url: str) -> str:
    """What became of a case, in a word or two. Raises Failed."""
    unnamed = {name: str(error) for name, error in seen.errors.items() if url not in str(error)}
    if unnamed:
        raise Failed(f"errors that name no place: {unnamed}")
    if damage.kind.startswith("forged"):
        return "refused" if seen.errors or not (seen.report and seen.report.ok) else "taken as it is"
    other = sorted(name for name, value in seen.values.items() if value != truth.values[name])
    noticed = "open" in seen.errors or "verify" in seen.errors or not (seen.report and seen.report.ok)
    assert truth.report
    unfinished = seen.report and sum(seen.report.missing.values()) > sum(truth.report.missing.values())
    if any(name.endswith((" codes", " maps", " summaries")) for name in other) and not damage.misplaced:
        raise Failed(f"read as if nothing had happened: {other}")
    if other and not noticed and not unfinished:
        raise Failed(f"verify finds nothing, and these are others: {other}")
    if seen.errors and not noticed and not unfinished:
        raise Failed(f"verify finds nothing, and these cannot be read: {seen.errors}")
    if any(name.endswith((" codes", " maps", " summaries")) for name in other):
        return "other features, named by verify"
    if other and noticed:
        return "told otherwise, named by verify"
    if noticed:
        return "named"
    return "shards missing, named" if unfinished else "no difference"


# ---------------------------------------------------------------- places to damage


class Place:
    """A cache that is damaged and put right again."""

    def __init__(self, storage: Storage, files: dict[str, bytes]) -> None:
        self.storage, self.files = storage, files

    @contextlib.contextmanager
    def damaged(self, changes: Changes) -> Iterator[Storage]:
        raise NotImplementedError


class FolderPlace(Place):
    def __init__(self, root: Path, files: dict[str, bytes]) -> None:
        super().__init__(LocalStorage(root, fsync=False), files)
        self._root = root
        for path, data in files.items():
            self._put(path, data)

    def _put(self, path: str, data: Any) -> None:
        file = self._root / path
        for parent in list(file.parents)[: path.count("/")]:
            if parent.is_file():
                parent.unlink()
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        if data is FOLDER:
            file.unlink(missing_ok=True)
            file.mkdir()
        elif data is None:
            file.unlink(missing_ok=True)
            for parent in list(file.parents)[: path.count("/")]:
                with contextlib.suppress(OSError):
                    parent.rmdir()
        else:
            file.write_bytes(data)

    @contextlib.contextmanager
    def damaged(self, changes: Changes) -> Iterator[Storage]:
        for path in sorted(changes, key=lambda path: changes[path] is not None):
            self._put(path, changes[path])
        try:
            yield self.storage
        finally:
            for path in changes:
                if path not in self.files:
                    self._put(path, None)
            for path, data in self.files.items():
                if path in changes or any(path.startswith(f"{changed}/") for changed in changes):
                    self._put(path, data)


class BucketPlace(Place):
    def __init__(self, files: dict[str, bytes]) -> None:
        import obstore
        from obstore.store import MemoryStore

        storage = ObjectStorage("s3://bucket/small.zarr")
        self._store = MemoryStore()
        storage._stores = {"read": self._store, "write": self._store}
        super().__init__(storage, files)
        self._obstore = obstore
        for path, data in files.items():
            obstore.put(self._store, path, data)

    @contextlib.contextmanager
    def damaged(self, changes: Changes) -> Iterator[Storage]:
        for path, data in changes.items():
            if data is None or data is FOLDER:  # a bucket has no folders
                with contextlib.suppress(FileNotFoundError):
                    self._obstore.delete(self._store, path)
            else:
                self._obstore.put(self._store, path, data)
        try:
            yield self.storage
        finally:
            for path in changes:
                if path in self.files:
                    self._obstore.put(self._store, path, self.files[path])
                else:
                    self._obstore.delete(self._store, path)


# ---------------------------------------------------------------- cases


def choose(seed: int, case: int, files: dict[str, bytes]) -> Damage:
    """The damage of a case."""
    rng = random.Random(f"{seed}:{case}")
    draw = rng.random()
    if draw < 0.25:
        return forgery(rng, files, SHARD_IMAGES, ROW_BYTES)
    return two_accidents(rng, files) if draw < 0.35 else accident(rng, files)


def _peak_reset() -> float:
    """Forget the largest size this process has had; its size now, in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> float:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0]) / 1024


def work(folder: Path, seed: int, cases: range, results: int) -> None:
    """Run cases and write a line about each to a descriptor; one before, too, so that whoever waits knows which hangs."""
    small = folder / "small.zarr"
    files = {file.relative_to(small).as_posix(): file.read_bytes() for file in small.rglob("*") if file.is_file()}
    places: list[Place] = [FolderPlace(folder / f"damaged-{os.getpid()}.zarr", files), BucketPlace(files)]
    usable = [row for row in range(10) if row != 6]
    rows = random.Random(seed).sample(usable, len(usable))
    reads = readings(rows, tuple(TEACHERS))
    truths = [look(place.storage, reads) for place in places]
    for truth in truths:
        assert not truth.errors, truth.errors
        assert truth.report
        assert truth.report.ok, truth.report
    # Threads reserve address space that they never use, so that this only stops what is absurd; the rest is measured.
    limit = int(_status("VmSize") + 4096) << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for case in cases:
        os.write(results, f"{case}\n".encode())
        damage = choose(seed, case, files)
        place, truth = places[case % 2], truths[case % 2]
        kinds = sorted({kind_of_file(path) for path in damage.changes})
        outcome: dict[str, Any] = {
            "case": case,
            "kind": damage.kind,
            "files": kinds[0] if len(kinds) == 1 else "several",
            "where": case % 2,
        }
        before = _peak_reset()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with place.damaged(damage.changes) as storage:
                    outcome["outcome"] = judge(damage, look(storage, reads), truth, storage.url)
            if _status("VmHWM") - before > MAX_MEGABYTES:
                raise Failed(f"{_status('VmHWM') - before:.0f} MB were allocated")
        except Exception as exc:
            outcome["failure"] = (
                f"{list(damage.changes)[:3]}: {exc}"
                if isinstance(exc, Failed)
                else (f"{list(damage.changes)[:3]}\n{''.join(traceback.format_exception(exc)[-4:])}")
            )
        outcome["megabytes"] = _status("VmHWM") - before
        os.write(results, json.dumps(outcome).encode() + b"\n")


def run(folder: Path, seed: int, cases: range) -> list[dict[str, Any]]:
    """All cases, in a process that may crash or hang: then another one goes on behind the case that did it."""
    outcomes: list[dict[str, Any]] = []
    while len(cases):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(reading)
                work(folder, seed, cases, writing)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(writing)
        begun, pending, hangs = cases[0], b"", False
        while True:
            ready, _, _ = select.select([reading], [], [], MAX_SECONDS)
            data = os.read(reading, 1 << 16) if ready else b""
            if not data:
                hangs = not ready
                break
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                if line.startswith(b"{"):
                    outcomes.append(json.loads(line))
                    if len(outcomes) % 500 == 0:
                        print(f"{len(outcomes)} cases", file=sys.stderr, flush=True)
                else:
                    begun = int(line)
        os.close(reading)
        if hangs:
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0 and not hangs:
            break
        what = f"more than {MAX_SECONDS} s" if hangs else f"the process ended with {code}"
        outcomes.append({"case": begun, "kind": "?", "files": "?", "where": begun % 2, "failure": what, "megabytes": 0})
        cases = range(begun + 1, cases.stop)
    return outcomes


def report(told: list[dict[str, Any]], seed: int, seconds: float) -> str:
    """Counts by kind of damage and by kind of file."""
    failed = [one for one in told if "failure" in one]
    lines = [f"{len(told)} cases, seed {seed}, {seconds:.0f} s, {len(failed)} failed", ""]
    for title, key in (("damage", "kind"), ("files", "files")):
        outcomes = sorted({one.get("outcome", "FAILED") for one in told})
        lines += [f"| {title} | cases | " + " | ".join(outcomes) + " |", "|---" * (2 + len(outcomes)) + "|"]
        for name in sorted({one[key] for one in told}):
            counts = Counter(one.get("outcome", "FAILED") for one in told if one[key] == name)
            lines.append(f"| {name} | {counts.total()} | " + " | ".join(str(counts[o] or "") for o in outcomes) + " |")
        lines.append("")
    lines.append(f"Most memory for one case: {max((one['megabytes'] for one in told), default=0):.0f} MB.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=10, help="failures to print")
    arguments = parser.parse_args()
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as name:
        folder = Path(name)
        make_cache(folder)
        started = time.monotonic()
        outcomes = run(folder, arguments.seed, range(arguments.first, arguments.first + arguments.cases))
        print(report(outcomes, arguments.seed, time.monotonic() - started))
    failed = [outcome for outcome in outcomes if "failure" in outcome]
    for outcome in failed[: arguments.show]:
        print(
            f"\ncase {outcome['case']}, {outcome['kind']}, {'a bucket' if outcome['where'] else 'a folder'}: {outcome['failure']}"
        )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
