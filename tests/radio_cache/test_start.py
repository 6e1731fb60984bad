"""Packages of the same import name from other distributions: named at the start, before anything of theirs runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from radio_cache import start

ROOT = Path(start.__file__).parents[1]


def test_our_own_packages_are_known() -> None:
    assert start.complaint_about_packages() == ""


def ran(program: str, *before: Path) -> subprocess.CompletedProcess[str]:
    """Run an entry point with these folders in front of the import path."""
    code = f"import sys; sys.argv = ['x', '--version']; from radio_cache import start; start.{program}()"
    path = os.pathsep.join(map(str, (*before, ROOT)))
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
        cwd="/",
    )


@pytest.mark.parametrize("program", ["radio_cache", "radio_train", "radio_eval", "radio_export"])
def test_a_package_in_our_place_is_named_and_not_run(tmp_path: Path, program: str) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer/__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "speech_trainer-1.0.dist-info").mkdir()
    (tmp_path / "speech_trainer-1.0.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: speech-trainer\nVersion: 1.0\n"
    )
    (tmp_path / "speech_trainer-1.0.dist-info/RECORD").write_text("trainer/__init__.py,,\n")
    done = ran(program, tmp_path)
    assert done.returncode == 1
    assert (
        f"the package 'trainer' ({tmp_path}/trainer/__init__.py) is of the distribution 'speech-trainer'" in done.stderr
    )
    assert "pip uninstall speech-trainer, then pip install --force-reinstall radio-cache" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_folder_of_the_same_name_is_named_too(tmp_path: Path) -> None:
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals/__init__.py").write_text("")
    done = ran("radio_eval", tmp_path)
    assert done.returncode == 1
    assert "is not radio-cache's own, which has the same import name: rename or remove it" in done.stderr


def test_programs_run_through_it() -> None:
    done = ran("radio_cache")
    assert done.returncode == 0, done.stderr
    assert "radio-cache, version" in done.stdout
