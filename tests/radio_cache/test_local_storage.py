"""A cache in a folder: what the system says comes with a cure; what a kill leaves behind, and who may remove it."""

import errno
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from radio_cache.errors import StorageError
from radio_cache.local_storage import LocalStorage, write_atomically


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, r"No space left on device \(3 bytes were to be written, \d+ of \d+ bytes are free on .* /.*: free"),
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
    from radio_cache.local_storage import _write_all  # pyright: ignore[reportPrivateUsage]

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
    from radio_cache.local_storage import write_atomically

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


def test_leftovers_of_dead_processes_go_and_all_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    path.mkdir()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    dead = [
        path / f"receipts/t/000001.json.tmp-{host}-{ended.pid}-0a1b2c3d",
        path / f"teachers/t.tmp-{host}-{ended.pid}-0a1b2c3d/zarr.json",
        tmp_path / f"c.zarr.tmp-{host}-{ended.pid}-0a1b2c3d/zarr.json",
    ]
    kept = [
        path / f"teachers/t.tmp-{host}-{os.getpid()}-0a1b2c3d/zarr.json",  # of a live process
        path / f"teachers/u.tmp-another-host-{ended.pid}-0a1b2c3d/zarr.json",  # of another machine
        path / "images/notes.tmp-mine",  # not named by us
        tmp_path / f"other.zarr.tmp-{host}-{ended.pid}-0a1b2c3d/zarr.json",  # of another cache
    ]
    for file in (*dead, *kept):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    assert LocalStorage(path).remove_leftovers() == 3
    assert [file.exists() for file in dead] == [False] * 3
    assert [file.exists() for file in kept] == [True] * 4
    assert not dead[2].parent.exists()
    assert LocalStorage(path).remove_leftovers() == 0


def test_removing_leftovers_of_a_cache_that_is_not_there_does_nothing(tmp_path: Path) -> None:
    assert LocalStorage(tmp_path / "nowhere/c.zarr").remove_leftovers() == 0
