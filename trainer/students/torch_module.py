"""A user's own network as a student: "torch-module:my_package.my_file:MyNet".

The network takes images (b, 3, h, w) with standardised colours and returns a map (b, c, h / p, w / p), or a summary
(b, s) and such a map. Its widths and its stride p are measured on one image.
"""

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from radio_cache.allowed_modules import import_class
from radio_cache.errors import ConfigError
from trainer.students.base import Encoded, Student


@final
class TorchModule(Student):
    """An `nn.Module` from an import path. Without a summary of its own, the summary is the mean of the map.

    Args:
        path: "package.module:Class" from the caller. Paths from files must pass
            `radio_cache.allowed_modules.refuse_unless_allowed` first.
        preferred_resolution: (height, width) of the image that it is measured on, pixels.
        min_resolution_step: sides are multiples of it; by default the measured stride.
        fixed_resolution: it accepts no other size.
        settings: for the network's constructor.

    Raises:
        ConfigError: for a path that names no subclass of `nn.Module`, or a network with another output.
    """

    def __init__(
        self,
        path: str,
        *,
        preferred_resolution: tuple[int, int] = (224, 224),
        min_resolution_step: int | None = None,
        fixed_resolution: bool = False,
        **settings: Any,
    ) -> None:
        net = _build(path, settings)
        hw = int(preferred_resolution[0]), int(preferred_resolution[1])
        summary_dim, width, grid_hw = _tried(path, net, hw)
        stride = hw[0] // grid_hw[0]
        if (stride * grid_hw[0], stride * grid_hw[1]) != hw:
            raise ConfigError(
                f"torch-module '{path}' gives a map of {grid_hw[0]} x {grid_hw[1]} for {hw[0]} x {hw[1]} pixels, which is "
                "no whole stride, the same down and across: choose a preferred_resolution that divides."
            )
        super().__init__(
            name=f"torch-module:{path}",
            patch_size=stride,
            embed_dim=width,
            summary_dim=summary_dim,
            min_resolution_step=min_resolution_step or stride,
            preferred_resolution=hw,
            fixed_resolution=hw if fixed_resolution else None,
        )
        self.net = net

    def _encode(self, images: Float[Tensor, "b 3 h w"]) -> Encoded:
        return _encoded(self.net(images))


def _build(path: str, settings: dict[str, Any]) -> nn.Module:
    """Construct the user's network; the class is known to be an `nn.Module` before it is called."""
    network = import_class(path, nn.Module, what=f"torch-module '{path}'", needed="nn.Module")
    try:
        return network(**settings)
    except TypeError as exc:
        raise ConfigError(f"torch-module '{path}' does not take the settings {sorted(settings)}: {exc}.") from exc
    except Exception as exc:  # a user's constructor may fail in any way
        raise ConfigError(f"torch-module '{path}' cannot be made: {type(exc).__name__}: {exc}") from exc


@torch.no_grad()
def _tried(path: str, net: nn.Module, hw: tuple[int, int]) -> tuple[int, int, tuple[int, int]]:
    """Return the width of the summary, the width of the map, and its (height, width) in tokens, for one black image."""
    # Evaluation mode, so that the trial does not change the statistics of batch norms.
    training = net.training
    try:
        out = _encoded(net.eval()(torch.zeros(1, 3, *hw)))
    except Exception as exc:  # a user's network may fail in any way
        raise ConfigError(f"torch-module '{path}' cannot take an image of {hw[0]} x {hw[1]} pixels: {exc}") from exc
    net.train(training)
    return int(out.summary.shape[1]), int(out.map.shape[1]), (int(out.map.shape[2]), int(out.map.shape[3]))


def _encoded(out: Any) -> Encoded:
    match out:
        case Tensor() if out.ndim == 4:
            # (b, c, h, w) -> (b, c)
            return Encoded(out.mean((2, 3)), out)
        case (Tensor() as summary, Tensor() as tokens_map) if summary.ndim == 2 and tokens_map.ndim == 4:
            return Encoded(summary, tokens_map)
        case _:
            parts = out if isinstance(out, tuple | list) else (out,)
            shapes = ", ".join(str(tuple(p.shape)) if isinstance(p, Tensor) else type(p).__name__ for p in parts)
            raise ConfigError(f"it returns {shapes}; expected is a map (b, c, h, w), or a summary (b, s) and a map.")
