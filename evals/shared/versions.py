"""The software and the machine that a result comes from, for its record."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from radio_cache import __version__

# Libraries whose version may change a figure.
_PACKAGES = ("torch", "timm", "numpy", "zarr", "pillow", "faiss-gpu", "faiss-cpu")


def software_versions() -> dict[str, str]:
    """Return package name -> version: radio-cache, Python, and the installed ones of the libraries that shape results."""
    versions = {"radio-cache": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        # Optional libraries: only those that are installed could have had an effect.
        except PackageNotFoundError:
            continue
    return versions


def hardware() -> str:
    """Return one line: the processor, the cores available to this process, and the GPUs that torch sees."""
    # A container or scheduler may grant fewer cores than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"{_processor()}, {cores} cores, " + (", ".join(gpus) if gpus else "no GPU")


def _processor() -> str:
    # `platform.processor` is empty on most Linux systems.
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
