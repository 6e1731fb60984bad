"""A cache in a folder: what the system says comes with a cure; what a kill leaves behind, and who may remove it."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from radio_cache.errors import StorageError
from radio_cache.storage.local import (
    LocalStorage,
    _this_kernel,  # pyright: ignore[reportPrivateUsage]
    write_atomically,
)


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (
            errno.ENOSPC,
            r"No space left on device \(3 bytes were to be written, \d+ of \d+ bytes are free on .* /.*: free",
        ),
        (errno.EROFS, "Read-only file system: the disk can only be read: choose a place that can be written"),
        (errno.EACCES, "Permission denied: choose a place that you may use"),
        (errno.EIO, "error: the disk has an error"),
    ],
)
def test_what_the_system_says_comes_with_the_place_and_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, cure: str
) -> None:
    storage = LocalStorage(tmp_path)
    storage.write("f", [b"old"])

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "writev", refuse)
    with pytest.raises(StorageError, match=f"cannot write {tmp_path}/f: .*{cure}"):
        storage.write("f", [b"new"])
    assert storage.read("f") == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_a_full_disk_keeps_what_was_there() -> None:
    """/dev/full answers every write with: no space left on device."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    from radio_cache.storage.local import _write_all  # pyright: ignore[reportPrivateUsage]

    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="No space left"):
            _write_all(descriptor, [b"x"])
    finally:
        os.close(descriptor)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole: Callable[..., int] = os.writev
    monkeypatch.setattr(os, "writev", lambda descriptor, parts: whole(descriptor, [parts[0][:2]]))
    LocalStorage(tmp_path).write("f", [b"hello", b"", b"w", b"orld"])
    assert (tmp_path / "f").read_bytes() == b"helloworld"


def test_without_syncing_nothing_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    monkeypatch.setattr(os, "fsync", synced.append)
    LocalStorage(tmp_path, fsync=False).write("new/f", [b"1"])
    assert synced == []
    LocalStorage(tmp_path).write("f", [b"1"])
    assert len(synced) == 2  # the file, and the folder that names it
    LocalStorage(tmp_path).write("newer/still/f", [b"1"])
    assert len(synced) == 2 + 4  # and both folders that got a new one


# ---------------------------------------------------------------- kills and leftovers

KILL_LOOP = """
    import os, random, signal, sys, time
    from pathlib import Path
    from radio_cache.storage.local import write_atomically

    target, rounds = Path(sys.argv[1]), int(sys.argv[2])
    contents = {bytes([letter]) * 300_000 for letter in b"abc"}
    write_atomically(target, b"a" * 300_000)
    for number in range(rounds):
        writer = os.fork()
        if writer == 0:
            while True:
                for content in contents:
                    write_atomically(target, content)
        time.sleep(random.Random(number).uniform(0.001, 0.03))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        if target.read_bytes() not in contents:
            sys.exit(f"after kill {number}: {target.stat().st_size} bytes that nobody wrote")
    print(sum(".tmp-" in entry.name for entry in target.parent.iterdir()))
"""


def test_a_killed_writer_leaves_the_old_content_or_the_new(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILL_LOOP), tmp_path / "file", "40"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert LocalStorage(tmp_path).remove_leftovers() == int(done.stdout) > 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"old")
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "file", "not bytes")  # type: ignore[arg-type]
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"file": b"old"}


@pytest.fixture
def stale_names(tmp_path: Path) -> Callable[..., list[Path]]:
    """Files and folders in and beside `c.zarr` under temporary names, which nobody holds."""

    def make(marks: str, *, days: float = 0) -> list[Path]:
        path = tmp_path / "c.zarr"
        made = [
            path / f"receipts/t/000001.json.tmp-{marks}",
            path / f"teachers/t.tmp-{marks}",
            tmp_path / f"c.zarr.tmp-{marks}",
        ]
        for number, entry in enumerate(made):
            inside = entry / "zarr.json" if number else entry
            inside.parent.mkdir(parents=True, exist_ok=True)
            inside.write_text("{}")
            for one in {inside, entry}:
                os.utime(one, (time.time() - days * 86_400,) * 2)
        return made

    return make


def test_leftovers_of_dead_processes_go_and_all_others_stay(
    tmp_path: Path, stale_names: Callable[..., list[Path]]
) -> None:
    kernel = _this_kernel() or pytest.skip("this system does not say which start of it this is")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead = [
        *stale_names(f"{socket.gethostname()}-{kernel}-1234567-0a1b2c3d"),
        *stale_names(f"{socket.gethostname()}-{kernel}-{os.getpid()}-0a1b2c3d"),  # that number was another process's
        *stale_names(
            "another-host-00000000-77-0a1b2c3d", days=1.1
        ),  # of another machine, whose locks may not be seen here
        *stale_names(f"{socket.gethostname()}-{ended.pid}-0a1b2c3d"),  # of an earlier version, which had no locks
        *stale_names("another-host-77-0a1b2c3d", days=1.1),
    ]
    kept = [
        *stale_names("another-host-00000000-78-0a1b2c3d", days=0.9),
        *stale_names(f"{socket.gethostname()}-{os.getpid()}-0a1b2c3d"),
        *stale_names("another-host-78-0a1b2c3d"),
        tmp_path / "c.zarr/images/notes.tmp-mine",  # not named by us
        tmp_path / f"other.zarr.tmp-{socket.gethostname()}-{kernel}-77-0a1b2c3d",  # of another cache
    ]
    for file in kept[-2:]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    storage = LocalStorage(tmp_path / "c.zarr")
    assert storage.remove_leftovers() == len(dead)
    assert not any(entry.exists() for entry in dead)
    assert all(entry.exists() for entry in kept)
    assert storage.remove_leftovers() == 0


ANOTHER = """
    import os, socket, sys
    from radio_cache.storage.local import LocalStorage

    assert socket.gethostname() == sys.argv[2]
    os.kill = lambda number, signal: (_ for _ in ()).throw(ProcessLookupError)  # as if in a container of its own
    print(LocalStorage(sys.argv[1]).remove_leftovers())
"""


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_a_living_build_writes_stays_whoever_else_has_its_host_name(tmp_path: Path, what: str) -> None:
    path = tmp_path / "c.zarr"
    storage = LocalStorage(path)
    removed: list[str] = []

    def clean() -> bytes:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(ANOTHER), path, socket.gethostname()], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        removed.append(done.stdout)
        return b"whole"

    if what == "folder":
        assert storage.write_tree("teachers/t", ((name, clean()) for name in ("a", "zarr.json")), last="zarr.json")
    else:
        with storage._written_aside("teachers/t/a", [b"whole"]) as (temporary, target):
            clean()
            temporary.replace(target)
    assert set(removed) == {"0\n"}
    assert (path / "teachers/t/a").read_bytes() == b"whole"
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_a_file_that_is_taken_for_a_leftover_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, taken = fcntl.flock, []

    def faster(descriptor: int, kind: int) -> None:
        if not taken:
            (leftover,) = tmp_path.glob("*.tmp-*")
            taken.append(leftover)
            leftover.rmdir() if leftover.is_dir() else leftover.unlink()
        lock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", faster)
    LocalStorage(tmp_path).write("f", [b"new"])
    assert (tmp_path / "f").read_bytes() == b"new"
    taken.clear()
    assert LocalStorage(tmp_path).write_tree("t", [("zarr.json", b"{}")], last="zarr.json")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["f", "t"]


def test_where_a_file_system_has_no_locks_age_alone_tells_what_was_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stale_names: Callable[..., list[Path]]
) -> None:
    kernel = _this_kernel() or pytest.skip("this system does not say which start of it this is")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    storage = LocalStorage(tmp_path / "c.zarr")
    storage.write("f", [b"new"])
    fresh = stale_names(f"host-{kernel}-77-0a1b2c3d")
    stale = stale_names(f"host-{kernel}-78-0a1b2c3d", days=2)
    assert storage.remove_leftovers() == len(stale)
    assert all(entry.exists() for entry in fresh)


def test_a_file_system_that_gives_nobody_a_lock_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(fcntl, "flock", busy)
    storage = LocalStorage(tmp_path / "c.zarr")
    storage.write("f", [b"new"])
    assert storage.write_tree("t", [("zarr.json", b"{}")], last="zarr.json")
    assert sorted(entry.name for entry in (tmp_path / "c.zarr").iterdir()) == ["f", "t"]


def test_removing_leftovers_of_a_cache_that_is_not_there_does_nothing(tmp_path: Path) -> None:
    assert LocalStorage(tmp_path / "nowhere/c.zarr").remove_leftovers() == 0
