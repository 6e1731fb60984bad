"""`radio-cache build` killed at any moment loses nothing that was finished, and the same command completes it."""

import subprocess
import sys
from pathlib import Path

from radio_cache.testing import write_images


def test_killed_interrupted_and_doubled_builds_end_with_the_bytes_of_an_uninterrupted_one(tmp_path: Path) -> None:
    write_images(tmp_path / "images", per_class=7, size=40)
    (tmp_path / "caches").mkdir()
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("killed_builds.py"), tmp_path / "caches", tmp_path / "images"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
