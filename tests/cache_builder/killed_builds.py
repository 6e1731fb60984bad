"""Kills the real `radio-cache build` at random moments, and starts it again. Run by `test_kills.py` as a program.

Every build is a process of its own, forked from one that has the libraries loaded: importing them takes longer than
these builds. Usage: killed_builds.py FOLDER IMAGES. Exits with a sentence if anything is not as it should be.
"""

import contextlib
import importlib.util
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from cache_builder.cli import main
from cache_builder.sources.listing_record import LISTING_FILE as LISTING
from radio_cache import Cache
from radio_cache.reader import is_cache

KILLS = 5
CALL_SECONDS = 0.015


def start(out: Path, images: Path, log: Path, *more: str) -> int:
    """Fork a `radio-cache build` and return its process number."""
    arguments = [
        "build",
        "--images",
        str(images),
        "--out",
        str(out),
        "--teacher",
        "fake-a",
        "--teacher",
        "fake-maps",
        "--shard-images",
        "1",
        "--batch-size",
        "2",
        "--threads",
        "2",
        "--device",
        "cpu",
        *more,
    ]
    child = os.fork()
    if child == 0:
        # A job in the background of a script ignores Ctrl-C, and its children inherit that; a terminal's do not.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code: object = 1
        try:
            with log.open("a") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
                try:
                    main(arguments)
                except SystemExit as exc:
                    code = exc.code
        finally:
            os._exit(code if isinstance(code, int) else 0)
    return child


def finish(child: int) -> int:
    """Exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tree(path: Path) -> dict[str, bytes]:
    files = (file for file in path.rglob("*") if file.is_file() and file.name != LISTING)  # which depends on the clock
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def expect(holds: bool, sentence: str, log: Path) -> None:
    if not holds:
        sys.exit(f"{sentence}\n{log.read_text() if log.exists() else ''}")


def same(out: Path, reference: Path) -> bool:
    return tree(out) == tree(reference)


def wait_for(receipts: int, out: Path, child: int, log: Path) -> None:
    """Until a build has written so many receipts."""
    deadline = time.monotonic() + 60
    while len(list((out / "receipts").rglob("*.json"))) < receipts:
        expect(os.waitpid(child, os.WNOHANG) == (0, 0), f"the build ended before it wrote {receipts} receipts", log)
        expect(time.monotonic() < deadline, f"no {receipts} receipts within a minute", log)
        time.sleep(0.001)


def whatever_a_receipt_vouches_for_is_there(out: Path, reference: Cache) -> int:
    """How many maps could be read of a cache that was killed a moment ago; all equal to the uninterrupted build's."""
    if not is_cache(out):
        return 0
    cache = Cache(out)
    read = 0
    for name, teacher in cache.teachers.items():
        rows = cache.usable_rows([name])
        if not np.array_equal(teacher.codes(rows), reference.teachers[name].codes(rows)):
            sys.exit(f"{out}: a map of {name} is not what the uninterrupted build stored")
        read += len(rows)
    return read


def interrupt(folder: Path, images: Path, reference: Path, shards: int) -> None:
    """Ctrl-C during the scan, the first and the second teacher; and every shard of a teacher is a line of the log, once."""
    out, log, json_log = folder / "interrupted.zarr", folder / "log-interrupted", folder / "lines.jsonl"
    for receipts in (2, shards // 2, shards - 4):
        child = start(out, images, log, "--log-json", str(json_log))
        wait_for(receipts, out, child, log)
        os.kill(child, signal.SIGINT)
        expect(finish(child) == 130, f"Ctrl-C at {receipts} receipts did not exit with 130", log)
        said = log.read_text()
        told = "Nothing is lost: the same command continues where this one stopped."
        expect(told in said and "shards are done and stay" in said, "Ctrl-C did not say how to go on", log)
        expect("Traceback" not in said, "Ctrl-C left a traceback", log)
        log.unlink()
    expect(finish(start(out, images, log, "--log-json", str(json_log))) == 0, "the build after Ctrl-C failed", log)
    expect(same(out, reference), "the build after Ctrl-C stored something else", log)
    lines = [json.loads(line) for line in json_log.read_text().splitlines()]
    expect([line["event"] for line in lines].count("stopped") == 3, "not every stop is in the log", json_log)
    for name in Cache(out).teachers:
        logged = sorted(line["shard"] for line in lines if line["event"] == "shard" and line["unit"] == name)
        expect(logged == list(range(Cache(out).meta.num_shards)), f"{name}: shards {logged}", json_log)


def run(folder: Path, images: Path) -> None:
    log = folder / "log"
    reference = folder / "reference.zarr"
    expect(finish(start(reference, images, log)) == 0, "the uninterrupted build failed", log)
    shards = len(list((reference / "receipts").rglob("*.json")))

    out, rng, seen = folder / "killed.zarr", random.Random(0), [0]
    # By progress and not by time: the machine may be busy. The first kill comes while the cache itself is made.
    for receipts in [0, *sorted(rng.sample(range(1, shards - 2), KILLS - 1))]:
        child = start(out, images, log)
        wait_for(receipts, out, child, log)
        time.sleep(rng.uniform(0, 0.04))
        os.kill(child, signal.SIGKILL)
        expect(finish(child) == -signal.SIGKILL, f"the build to be killed at {receipts} receipts ended before", log)
        seen.append(whatever_a_receipt_vouches_for_is_there(out, Cache(reference)))
    expect(seen == sorted(seen) and seen[-1] > 0, f"finished work was lost or none was done: {seen} maps", log)
    expect(finish(start(out, images, log)) == 0, "the build after the kills failed", log)
    expect(same(out, reference), "the build after the kills stored something else", log)
    cache = Cache(out)
    expect(len(cache.usable_rows(cache.teachers)) == cache.num_images, "rows are missing after the kills", log)

    interrupt(folder, images, reference, shards)

    out = folder / "two.zarr"
    children = [start(out, images, log) for _ in range(2)]
    expect([finish(child) for child in children] == [0, 0], "two builds at once got in each other's way", log)
    expect(same(out, reference), "two builds at once stored something else", log)

    left = [entry.name for entry in folder.rglob("*") if ".tmp-" in entry.name]
    expect(not left, f"leftovers: {left}", log)
    sys.stdout.write(f"maps that were safe after each kill: {seen[1:]}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("fake_teacher", Path(__file__).with_name("fake_teacher.py"))
    assert spec is not None
    assert spec.loader is not None
    fake = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fake)
    fake.CALL_SECONDS = CALL_SECONDS
    fake.register()
    run(Path(sys.argv[1]), Path(sys.argv[2]))
