"""Shared by models of timm and open_clip: random weights, tokens that tile the input, messages."""

import contextlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cache_builder.teachers.preprocessing import Preprocessing
from cache_builder.teachers.weights import first_line
from evals.encoders.network import Network, NetworkOutput
from radio_cache.errors import ConfigError

Weights = Path | Literal["random"] | None
"""A local file in the library's own format, random weights with seed 0, or None for the published ones."""


def tiling_network(
    library: str,
    model: str,
    weights: Weights,
    module: torch.nn.Module,
    call: Callable[[Tensor], NetworkOutput],
    prepared: Preprocessing,
    *,
    device: torch.device,
    at_size: Callable[[int], Network],
) -> Network:
    """Return a network whose tokens tile its input evenly; it is run once to count them.

    Args:
        library: name for messages.
        model: name for messages.
        weights: for the description.
        module: holds the parameters.
        call: runs the network.
        prepared: preprocessing of the library.
        device: of the network.
        at_size: makes the same network for another input size.

    Raises:
        ConfigError: if the network does not take input of this size.
    """
    size = prepared.size_px
    try:
        with torch.inference_mode():
            # (1, 3, size, size) -> (1, h, w, c); zeros are enough to see the shape.
            probe_map = call(torch.zeros(1, 3, size, size, device=device)).spatial
    except Exception as exc:  # libraries assert, or fail in the middle of a reshape
        raise ConfigError(f"{library} model '{model}' cannot take {size} px: {exc}") from exc
    grid_side = 1 if probe_map is None else int(probe_map.shape[1])
    stride = size / grid_side  # the centre of the first token lies half a stride from the edge
    return Network(
        description=f"{library} {model}" + (", random weights" if weights == "random" else ""),
        geometry=prepared.geometry(grid_side, stride, stride / 2),
        normalisation=prepared.normalisation,
        has_summary=True,
        has_map=probe_map is not None,
        module=module,
        call=call,
        at_size=at_size,
    )


@contextlib.contextmanager
def seeded() -> Generator[None]:
    """Initialise weights with seed 0 inside the context, and restore torch's random state afterwards."""
    # Only the CPU's generator: weights are initialised there and moved afterwards.
    state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def no_weights(model: str, exc: Exception) -> str:
    """Return the message for published weights that could not be downloaded."""
    return (
        f"{model} has no weights on this machine, and they could not be downloaded ({first_line(exc)}). Fetch them on a "
        "machine with a network and give them by --weights FILE; --weights random measures the untrained network"
    )
