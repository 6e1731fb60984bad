"""Choosing a device by name."""

import torch

from radio_cache.errors import ConfigError


def pick_device(name: str) -> str:
    """`auto` is the GPU if there is one, else the CPU; any other name is tried. Raises ConfigError if it cannot be used."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as exc:
        raise ConfigError(f"--device {name} cannot be used here: {str(exc).splitlines()[0]}") from exc
    return name
