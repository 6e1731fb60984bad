"""The demo of `radio-cache demo`: the whole pipeline in a few minutes, offline, through the same commands a user types.

The stages do not import each other, so the demo runs their commands as a user would, and prints each one.
"""

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cache_builder.demo.images import DemoImagesConfig, bundled_photos, make_demo_images, own_photos
from radio_cache.errors import NotACacheError, RadioCacheError

TEACHERS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
_MARK = ".radio-cache-demo"
"""Empty file that marks a folder as the demo's."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The configuration of the demo.

    Attributes:
        out: folder for all files of the demo.
        images: folder of the user's photos; None for the bundled ones.
    """

    out: Path
    images: Path | None = None


@dataclass(frozen=True)
class DemoReport:
    """The result of the demo.

    Attributes:
        page: the HTML report.
        seconds: duration by step.
    """

    page: Path
    seconds: dict[str, float]


def run_demo(config: DemoConfig, on_message: Callable[[str], None]) -> DemoReport:
    """Make images, build two caches, train a student, evaluate it and write the report.

    A repeated call continues where the last one stopped.

    Args:
        config: of the demo.
        on_message: called with a message before each step.

    Raises:
        SourceError: for photos that cannot be used.
        NotACacheError: if `out` exists and is not the demo's folder.
        RadioCacheError: naming the command, if a step fails.
    """
    out = config.out
    # Never write into a folder of the user: only into a new or empty one, or one with the mark.
    if out.exists() and not (out / _MARK).exists() and (not out.is_dir() or any(out.iterdir())):
        raise NotACacheError(f"{out} exists and is not a demo's folder: choose another --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).touch()
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    cut = DemoImagesConfig()
    photos = bundled_photos() if config.images is None else own_photos(config.images, cut)
    images = make_demo_images(photos, out / "images", cut)
    for reason in images.skipped:
        on_message(f"left out {reason}")
    origin = "that ship with scikit-image and scikit-learn" if config.images is None else f"of {config.images}"
    on_message(
        f"{len(images.photos)} photographs {origin}. A class is a photo: {cut.train_crops} training crops from one end of each, "
        f"{cut.test_crops} test crops from the other end, no pixel in both."
    )
    seconds["images"] = time.perf_counter() - started
    # Small teachers whose weights need no download, so that the demo runs offline on a CPU.
    teachers = [word for name in TEACHERS for word in ("--teacher", name)]
    # Calibrating klt would run each teacher on a third more crops, to save 20 MB.
    teachers += ["--codec", "half"]
    train, test, run, page = out / "train.zarr", out / "test.zarr", out / "run", out / "report.html"
    steps = (
        (
            "teachers on the training crops",
            ["radio-cache", "build", "--images", images.train, *teachers, "--out", train],
        ),
        ("teachers on the test crops", ["radio-cache", "build", "--images", images.test, *teachers, "--out", test]),
        ("training the student", ["radio-train", "--cache", train, "--recipe", "demo", "--out", run]),
        (
            "k-NN and the page",
            ["radio-eval", "all", "--cache", train, "--queries", test, "--run", run, "--out", page],
        ),
    )
    for number, (title, command) in enumerate(steps, start=1):
        on_message(f"\n[{number}/{len(steps)}] {title}\n$ {shlex.join(map(str, command))}")
        started = time.perf_counter()
        _run([str(word) for word in command])
        seconds[title] = time.perf_counter() - started
    return DemoReport(page, seconds)


def _run(command: list[str]) -> None:
    # That of this environment first: another version may come first on the PATH.
    beside = Path(sys.executable).parent / command[0]
    program = str(beside) if beside.exists() else shutil.which(command[0])
    if program is None:
        raise RadioCacheError(
            f"the command {command[0]} is not installed beside {sys.executable}: pip install the project again"
        )
    # Standard output and error are inherited, so that the command's output is part of the demo's.
    code = subprocess.run([program, *command[1:]], check=False).returncode
    if code != 0:
        raise RadioCacheError(
            f"the demo stopped: `{shlex.join(command)}` ended with exit code {code}; its message is above"
        )
