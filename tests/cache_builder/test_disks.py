"""`radio-cache build` on a disk that is full or can only be read; both are real, and skipped where none can be mounted."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from radio_cache import Cache
from radio_cache.checks.verify import verify_cache
from radio_cache.testing import write_images

FAKE_TEACHER = Path(__file__).with_name("fake_teacher.py")


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The real `radio-cache` command, with two teachers that need no weights."""
    return subprocess.run([sys.executable, FAKE_TEACHER, *map(str, arguments)], capture_output=True, text=True)


def tree(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_build_that_fills_the_disk_says_so_and_is_completed_when_there_is_room(
    small_disk: Callable[[int], Any], tmp_path: Path
) -> None:
    write_images(tmp_path / "photos", per_class=10, size=40)
    for folder in (tmp_path / "photos", *(tmp_path / "photos").iterdir()):
        os.utime(folder, (0, 0))  # or whether the listing is kept would depend on how fast the command starts
    options = [
        "--images",
        tmp_path / "photos",
        "--teacher",
        "fake-a",
        "--teacher",
        "fake-maps",
        "--shard-images",
        "2",
        "--batch-size",
        "2",
        "--device",
        "cpu",
        "--codec",
        "half",
    ]
    assert command("build", *options, "--out", tmp_path / "roomy.zarr").returncode == 0
    pages = sum(-(-file.stat().st_size // 4096) for file in (tmp_path / "roomy.zarr").rglob("*") if file.is_file())
    needed = pages * 4096
    disk = small_disk(needed // 2)
    out = disk.path / "c.zarr"
    failed = command("build", *options, "--out", out)
    assert failed.returncode == 1
    full = (
        rf"error: cannot write {out}/\S+: No space left on device \(\d+ bytes were to be written, \d+ of \d+ bytes are free "
        rf"on the disk at {disk.path}\): free some space and run the same command again"
    )
    assert re.search(full, failed.stderr), failed.stderr
    assert "Traceback" not in failed.stderr
    assert verify_cache(Cache(out), deep=True).ok
    disk.resize(4 * needed)
    done = command("build", *options, "--out", out)
    assert done.returncode == 0, done.stderr
    assert tree(out) == tree(tmp_path / "roomy.zarr")

    disk.make_read_only()
    for read in (["info", out], ["verify", "--deep", out], ["build", *options, "--out", out]):
        done = command(*read)
        assert done.returncode == 0, done.stderr
    refused = command("build", *options, "--out", disk.path / "another.zarr")
    assert refused.returncode == 1
    assert "Read-only file system: the disk can only be read: choose a place that can be written" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", per_class=1)
    (tmp_path / "locked").mkdir(mode=0o500)
    refused = command(
        "build", "--images", tmp_path / "photos", "--teacher", "fake-a", "--out", tmp_path / "locked/c.zarr"
    )
    assert refused.returncode == 1
    assert "Permission denied: choose a place that you may use" in refused.stderr
