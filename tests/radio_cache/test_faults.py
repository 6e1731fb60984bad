"""The programs of benchmarks/faults, for a short while: kills at any moment, and damage of every kind.

In full they are run by hand, and marked slow here; what they found is in benchmarks/results.
"""

import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).parents[2] / "benchmarks/faults"


def run(program: str, *options: str, timeout_s: float) -> str:
    """What a program prints; an assertion error with all of it if it finds anything wrong."""
    done = subprocess.run(
        [sys.executable, FAULTS / program, *options], capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("cycles", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_killed_at_any_moment_a_cache_is_right_or_its_damage_is_named_and_mended(cycles: int, tmp_path: Path) -> None:
    told = run("kill_cycles.py", "--cycles", str(cycles), "--folder", str(tmp_path), timeout_s=1800)
    assert f"{cycles} cycles" in told
    assert "'drop a teacher' ended with the bytes of an undisturbed one" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cases", [200, pytest.param(20_000, marks=pytest.mark.slow)])
def test_damage_of_any_kind_is_named_or_changes_nothing(cases: int) -> None:
    assert f"{cases} cases, seed 0" in run("fuzz.py", "--cases", str(cases), timeout_s=7200)
