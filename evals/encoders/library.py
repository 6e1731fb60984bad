"""What models of timm and open_clip share: weights that may be random, tokens that tile."""

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
    """A network whose tokens tile its input evenly; it is run once to see how many there are.

    Raises ConfigError if it does not take input of this size.
    """
    size = prepared.size_px
    try:
        with torch.inference_mode():
            probe = call(torch.zeros(1, 3, size, size, device=device)).spatial
    except Exception as exc:  # libraries assert, or fail in the middle of a reshape
        raise ConfigError(f"{library} model '{model}' cannot take {size} px: {exc}") from exc
    tokens = 1 if probe is None else int(probe.shape[1])
    stride = size / tokens
    return Network(
        about=f"{library} {model}" + (", random weights" if weights == "random" else ""),
        geometry=prepared.geometry(tokens, stride, stride / 2),
        normalisation=prepared.normalisation,
        has_summary=True,
        has_map=probe is not None,
        module=module,
        call=call,
        at_size=at_size,
    )


@contextlib.contextmanager
def seeded() -> Generator[None]:
    """Random weights made inside are those of seed 0; whoever draws numbers afterwards notices nothing."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def no_weights(what: str, exc: Exception) -> str:
    """The sentence for published weights that could not be fetched."""
    return (
        f"{what} has no weights here, and they could not be downloaded ({first_line(exc)}). Fetch them on a machine with a "
        "network and give them by --weights FILE; --weights random measures the untrained network"
    )
