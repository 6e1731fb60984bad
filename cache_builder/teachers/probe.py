"""The geometry and the widths of a network's features, from a run on the meta device before weights are loaded."""

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
    subject: str,
    native_px: int,
) -> Probed:
    """Build a network without weights, run it once, and follow its tokens back to the input.

    Args:
        build: builds the network at the input size.
        call: computes features with it.
        prepared: preprocessing, which sets the input size.
        subject: the teacher in words, for messages.
        native_px: input size that certainly works, for messages.

    Raises:
        ConfigError: the network does not take this size, or the position of its tokens is unknown.
    """
    size = prepared.size_px
    out: list[Features] = []

    def run() -> int:
        # The meta device computes shapes only: even the largest teacher takes milliseconds and no memory.
        out.append(call(net, torch.zeros(1, 3, size, size)))
        return int(out[0].spatial.shape[1])

    try:
        with torch.device("meta"), torch.no_grad():
            net = build()
            centres = token_centres(net, run, subject=subject, size_px=size)
    except ConfigError:
        raise
    except Exception as exc:  # libraries assert, or fail in the middle of a reshape
        raise ConfigError(
            f"{subject} cannot take {size} px: {first_line(exc)}. Its own size is {native_px} px"
        ) from exc
    ((summary, spatial),) = out
    assert summary is not None
    # summary (1, c), spatial (1, h, w, c)
    geometry = prepared.geometry(int(spatial.shape[1]), centres.stride_px, centres.offset_px)
    return Probed(geometry, int(summary.shape[1]), int(spatial.shape[3]))
