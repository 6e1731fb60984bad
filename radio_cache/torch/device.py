"""Selection of a device by name."""

import torch

from radio_cache.errors import ConfigError


def pick_device(name: str) -> str:
    """Return the torch device for the value of `--device`.

    Args:
        name: "auto" for the GPU if there is one and the CPU otherwise, or any name that torch accepts.

    Raises:
        ConfigError: if the device cannot be used on this machine.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # Allocation is the only test that covers drivers, device numbers and builds of torch without the backend.
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as exc:
        raise ConfigError(f"--device {name} cannot be used here: {str(exc).splitlines()[0]}") from exc
    return name
