"""Disks that are full, or can only be read: named with the cure, nothing that was finished is lost, and more room completes it.

The disks are real file systems in memory. Where none can be mounted, those tests are skipped, and the ones that simulate a
disk by what the system calls answer still run.
"""

import errno
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import pytest

from radio_cache import Cache
from radio_cache.checks.verify import drop_teacher, repair_cache, verify_cache
from radio_cache.errors import StorageError
from radio_cache.format.schema import IMAGES_UNIT
from radio_cache.reader import is_cache
from radio_cache.shards.encoding import LABEL_BYTES, index_bytes
from radio_cache.storage.local import LocalStorage
from radio_cache.writer import ShardWriter


class Disk(Protocol):
    path: Path

    def resize(self, num_bytes: int) -> None: ...
    def make_read_only(self) -> None: ...


@pytest.fixture(scope="module")
def small_writer() -> ModuleType:
    """The writer that `kill_cycles.py` kills: it builds, grows, makes dropped shards and a dropped teacher again."""
    path = Path(__file__).parents[2] / "benchmarks/faults/small_writer.py"
    spec = importlib.util.spec_from_file_location("small_writer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["small_writer"] = module
    spec.loader.exec_module(module)
    return module


class SimulatedDisk:
    """What the system answers when a disk has no more room, or must not be written: for places where none can be mounted."""

    def __init__(self, path: Path, num_bytes: int, patched: pytest.MonkeyPatch) -> None:
        self.path, self._room, self._read_only = path, num_bytes, False
        path.mkdir()
        for module, name in (
            (os, "mkdir"),
            (os, "rename"),
            (os, "replace"),
            (os, "unlink"),
            (os, "link"),
            (os, "rmdir"),
        ):
            patched.setattr(module, name, self._unless_read_only(getattr(module, name)))
        opened, writev, write_bytes = os.open, os.writev, Path.write_bytes

        def open_file(place: Any, flags: int, *rest: Any, **named: Any) -> int:
            if self._read_only and flags & os.O_CREAT:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(place))
            return opened(place, flags, *rest, **named)

        def write(descriptor: int, parts: list[Any]) -> int:
            # A disk takes what it has room for first, and then nothing.
            part = bytes(parts[0])[: self._left()]
            if not part:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return writev(descriptor, [part])

        def write_all(place: Path, data: bytes) -> int:
            if self._read_only:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(place))
            if len(data) > self._left():
                write_bytes(place, data[: self._left()])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))
            return write_bytes(place, data)

        patched.setattr(os, "open", open_file)
        patched.setattr(os, "writev", write)
        patched.setattr(Path, "write_bytes", write_all)

    def resize(self, num_bytes: int) -> None:
        self._room = num_bytes

    def make_read_only(self) -> None:
        self._read_only = True

    def _left(self) -> int:
        return max(0, self._room - sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file()))

    def _unless_read_only(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            if self._read_only:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(given[0]))
            return original(*given, **named)

        return run


@pytest.fixture(params=["real", "simulated"])
def make_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[int], Disk]]:
    """make_disk(bytes) -> a disk of that size."""
    if request.param == "real":
        yield request.getfixturevalue("small_disk")
        return
    with pytest.MonkeyPatch.context() as patched:
        yield lambda num_bytes: SimulatedDisk(tmp_path / "simulated", num_bytes, patched)


FULL = re.compile(
    r"cannot write (?P<file>\S+): No space left on device \((\d+ bytes were to be written, )?\d+ of \d+ bytes are free "
    r"on the disk at /\S*\): free some space and run the same command again; nothing that was finished is lost"
)


def data_files(place: Path) -> dict[str, bytes]:
    storage = LocalStorage(place)
    return {path: storage.read(path) for path, _ in storage.list_files() if not path.startswith("receipts/")}


def refusal(work: Callable[[], object]) -> str:
    """What a disk refuses it with; empty if it does not."""
    try:
        work()
    except StorageError as exc:
        return str(exc)
    return ""


def test_a_disk_that_is_full_at_any_moment_costs_nothing_but_time(
    make_disk: Callable[[int], Disk], small_writer: ModuleType, tmp_path: Path
) -> None:
    expected: dict[str, dict[str, bytes]] = {}
    for phase in small_writer.PHASES:
        small_writer.write(tmp_path / "roomy.zarr", phase)
        expected[phase] = data_files(tmp_path / "roomy.zarr")
    num_bytes, full = 40 << 10, 0
    disk = make_disk(num_bytes)
    place = disk.path / "c.zarr"
    finished: set[tuple[str, int]] = set()
    for phase in small_writer.PHASES:
        while error := refusal(lambda phase=phase: small_writer.write(place, phase)):
            told = FULL.search(error)
            assert told, error
            assert told["file"].startswith(str(disk.path))
            full += 1
            num_bytes += 40 << 10
            disk.resize(num_bytes)
            assert not [file for file in disk.path.rglob("*") if ".tmp-" in file.name]
            if is_cache(place):
                cache = Cache(place)
                assert verify_cache(cache, deep=True).ok
                now = {
                    (unit, one.shard) for unit in (IMAGES_UNIT, *cache.teachers) for one in cache.receipts(unit) if one
                }
                assert phase not in ("build", "grow") or {one for one in finished if one[1] != 4} <= now
                finished = now
        assert data_files(place) == expected[phase]
    assert verify_cache(Cache(place), deep=True).ok
    assert full > 10


def test_a_shard_for_which_there_is_no_room_is_named_with_its_bytes(
    make_disk: Callable[[int], Disk], small_writer: ModuleType
) -> None:
    disk = make_disk(200 << 10)
    place = disk.path / "c.zarr"
    with pytest.raises(StorageError):
        small_writer.write(place, "build")
    shard = ShardWriter(place, "half", 3)
    rows = [np.zeros((16, 16, 24), np.float16)] * 6

    def write_shards() -> None:
        for number in range(5, 12):
            shard.write_sharded("spatial", rows, grid=(0, number, 0, 0, 0), chunks_per_shard=6)

    told = refusal(write_shards)
    assert FULL.search(told)
    assert f"({6 * (16 * 16 * 24 * 2 + 4) + LABEL_BYTES + index_bytes(6)} bytes were to be written, " in told
    assert verify_cache(Cache(place), deep=True).ok


def test_a_disk_that_can_only_be_read_serves_readers_and_names_itself_to_writers(
    make_disk: Callable[[int], Disk], small_writer: ModuleType
) -> None:
    disk = make_disk(4 << 20)
    place = disk.path / "c.zarr"
    small_writer.write(place, "build")
    before = data_files(place)
    disk.make_read_only()
    cache = Cache(place)
    assert verify_cache(cache, deep=True).ok
    assert len(cache.teachers["half"].maps(cache.usable_rows(["half"]))) > 20
    small_writer.write(place, "build")  # all is there: nothing is written
    assert repair_cache(cache, verify_cache(cache)) == []
    read_only = r"Read-only file system: the disk can only be read: choose a place that can be written"
    for write in (
        lambda: small_writer.write(place, "grow"),
        lambda: small_writer.write(disk.path / "new.zarr", "build"),
        lambda: small_writer.write(place, "repair"),
        lambda: drop_teacher(cache, "half"),
        lambda: ShardWriter(place, "half", 0).commit({"first_row": 0, "num_rows": 6, "num_tokens": 0, "failures": ()}),
    ):
        with pytest.raises(StorageError, match=f"cannot (write|delete) {disk.path}/.*: {read_only}"):
            write()
    assert data_files(place) == before
