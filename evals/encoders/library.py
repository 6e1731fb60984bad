"""What models of timm and open_clip share: weights that may be random, preprocessing that may be unknown, tokens that tile."""

import contextlib
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from cache_builder.teachers.weights import first_line
from evals.encoders.network import Network, NetworkOutput
from radio_cache.crops import Fit, Interpolation, ViewGeometry
from radio_cache.errors import ConfigError
from radio_cache.schema import Normalisation

Weights = Path | Literal["random"] | None
"""A local file in the library's own format, random weights with seed 0, or None for the published ones."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a library prepares an image. mean, std: of pixels in [0, 1]."""

    fit: Fit
    interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def preprocessing(what: str, fit: str, config: Mapping[str, Any], known_fits: Mapping[str, Fit]) -> Preprocessing:
    """A library's configuration in our words. Raises ConfigError, naming the model, for what we have no word for."""
    if fit not in known_fits or config["interpolation"] not in get_args(Interpolation):
        raise ConfigError(
            f"{what} wants its images fitted by '{fit}' and resized '{config['interpolation']}', which is not known here; "
            f"known are {', '.join(known_fits)}; {', '.join(get_args(Interpolation))}"
        )
    return Preprocessing(
        fit=known_fits[fit], interpolation=cast(Interpolation, config["interpolation"]), mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )  # fmt: skip


def tiling_network(
    library: str, model: str, weights: Weights, call: Callable[[Tensor], NetworkOutput], prepared: Preprocessing,
    *, input_hw: tuple[int, int], resize_px: int, device: torch.device, at_size: Callable[[int], Network],
) -> Network:  # fmt: skip
    """A network whose tokens tile its input evenly; it is run once to see how many there are.

    Raises ConfigError if it does not take input of this size.
    """
    try:
        with torch.inference_mode():
            probe = call(torch.zeros(1, 3, *input_hw, device=device)).spatial
    except Exception as exc:  # libraries assert, or fail in the middle of a reshape
        raise ConfigError(f"{library} model '{model}' cannot take {input_hw[0]} px: {exc}") from exc
    grid_hw = (1, 1) if probe is None else (int(probe.shape[1]), int(probe.shape[2]))
    stride = input_hw[0] / grid_hw[0]
    geometry = ViewGeometry(
        fit=prepared.fit, input_hw=input_hw, resize_px=resize_px, interpolation=prepared.interpolation, grid_hw=grid_hw,
        stride_px=stride, offset_px=stride / 2,
    )  # fmt: skip
    return Network(
        about=f"{library} {model}" + (", random weights" if weights == "random" else ""),
        geometry=geometry, normalisation=Normalisation(scale=255.0, mean=prepared.mean, std=prepared.std),
        has_summary=True, has_map=probe is not None, call=call, at_size=at_size,
    )  # fmt: skip


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
