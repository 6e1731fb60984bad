"""What a command loads before it does anything: torch and the teachers' libraries take seconds, most commands need neither."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "torchvision", "timm", "open_clip", "segment_anything", "dask", "faiss", "pyarrow"}

PROGRAM = """
import sys
from cache_builder.cli import main
try:
    main(sys.argv[1:])
finally:
    print("loaded:", *sys.modules, file=sys.stderr)
"""


def loaded_by(*arguments: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.rpartition("loaded:")[2].split())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["build", "--help"], ["teachers"], ["info", "CACHE"], ["verify", "CACHE"]], ids=" ".join
)
def test_a_command_that_runs_no_teacher_loads_no_library_of_one(arguments: list[str], golden: Path) -> None:
    loaded = loaded_by(*(str(golden) if word == "CACHE" else word for word in arguments))
    assert not loaded & HEAVY
    assert "cache_builder.cli" in loaded


def test_a_teacher_loads_the_library_of_its_family_alone() -> None:
    program = (
        "import sys\nfrom cache_builder.teachers import load_teacher\n"
        "load_teacher('efficientnet-lite0')\nprint(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & {"timm", "open_clip", "segment_anything"} == {"timm"}


@pytest.fixture(scope="module")
def golden() -> Path:
    """A cache of an earlier day, for reading only."""
    return Path(__file__).parent.parent / "golden/v1-sealed.zarr"
