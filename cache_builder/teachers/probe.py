"""What a network makes of an image, found out before weights are loaded: a run on the meta device, of shapes only."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cache_builder.teachers.base import Features
from cache_builder.teachers.preprocessing import Preprocessing
from cache_builder.teachers.token_centres import token_centres
from cache_builder.teachers.weights import first_line
from radio_cache.errors import ConfigError
from radio_cache.geometry.crops import ViewGeometry


class Probed(NamedTuple):
    """The parts of a teacher's spec that follow from its network and the input size."""

    geometry: ViewGeometry
    summary_dim: int
    spatial_dim: int


def probe(
    build: Callable[[], Any],
    call: Callable[[Any, Tensor], Features],
    prepared: Preprocessing,
    *,
    what: str,
    native_px: int,
) -> Probed:
    """Build a network of no weights, run it once, and follow its tokens back to the input.

    what: the teacher in words, for messages. native_px: the size that surely works.
    Raises ConfigError if it does not take input of this size, or where its tokens lie cannot be told.
    """
    size = prepared.size_px
    out: list[Features] = []

    def run() -> int:
        out.append(call(net, torch.zeros(1, 3, size, size)))
        return int(out[0].spatial.shape[1])

    try:
        with torch.device("meta"), torch.no_grad():
            net = build()
            centres = token_centres(net, run, what=what, size_px=size)
    except ConfigError:
        raise
    except Exception as exc:  # libraries assert, or fail in the middle of a reshape
        raise ConfigError(f"{what} cannot take {size} px: {first_line(exc)}. Its own size is {native_px} px") from exc
    ((summary, spatial),) = out
    assert summary is not None
    geometry = prepared.geometry(int(spatial.shape[1]), centres.stride_px, centres.offset_px)
    return Probed(geometry, int(summary.shape[1]), int(spatial.shape[3]))
