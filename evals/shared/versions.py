"""Which software and which machine a number comes from."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from radio_cache import __version__

_PACKAGES = ("torch", "timm", "numpy", "zarr", "pillow", "faiss-gpu", "faiss-cpu")


def software_versions() -> dict[str, str]:
    """Package name -> version, of radio-cache, Python and whatever of the libraries that shape results is installed."""
    versions = {"radio-cache": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def hardware() -> str:
    """One line: the processor, its cores available to us, and the GPUs torch sees."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"{_processor()}, {cores} cores, " + (", ".join(gpus) if gpus else "no GPU")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
