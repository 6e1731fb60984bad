"""The positions of a network's tokens in its input, followed through its strided convolutions and pools.

The token of a ViT is centred in its patch. That of a ResNet is not centred in its 32 pixels: padding by one pixel on
both sides centres output k of a 3x3 convolution with stride 2 on input 2k, so the tokens of ResNet-50 at 224 px are
centred at 0.5, 32.5, ..., 192.5. The number of tokens alone does not determine this.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from timm.models.naflexvit import NaFlexVit
from timm.models.swin_transformer import PatchMerging
from timm.models.swin_transformer_v2 import PatchMerging as PatchMergingV2
from torch import nn

from radio_cache.errors import ConfigError


class TokenCentres(NamedTuple):
    """Positions along a side: token k is centred at input pixel offset_px + k * stride_px."""

    stride_px: float
    offset_px: float


class _Step(NamedTuple):
    """One strided layer, along one side: output k is centred on input k * stride + shift."""

    size_in: int
    size_out: int
    stride: int
    shift: float


def token_centres(net: nn.Module, call: Callable[[], int], *, subject: str, size_px: int) -> TokenCentres:
    """Follow one side of an image through the layers of a network to the side of its map.

    Args:
        net: the network, possibly on the meta device: only sizes are used.
        call: runs `net` on one image, and returns the side of the map in tokens.
        subject: the network in words, for messages.
        size_px: side of the image.

    Raises:
        ConfigError: parallel branches have different centres, or a layer in between is of an unknown kind.
    """
    steps: set[_Step] = set()

    def record(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if (step := _step(module, inputs[0], output)) is not None:
            steps.add(step)

    hooks = [module.register_forward_hook(record) for module in net.modules() if isinstance(module, _STRIDED)]
    try:
        tokens = call()
    finally:
        for hook in hooks:
            hook.remove()
    if isinstance(net, NaFlexVit):  # cuts patches by reshaping
        patch = _along_side(net.embeds.patch_size)
        steps = {_Step(size_px, size_px // patch, patch, (patch - 1) / 2)}
    return _follow(steps, size_px, tokens, subject)


def _follow(steps: set[_Step], size_px: int, tokens: int, subject: str) -> TokenCentres:
    """Chain the layers by their sizes, from the image to the map.

    Raises:
        ConfigError: no layer, or several different ones, lead on from a size.
    """
    size, stride, centre = size_px, 1, 0.0
    while size != tokens:
        next_steps = [step for step in steps if step.size_in == size]
        if not next_steps:
            raise ConfigError(
                f"{subject} gets from {size} to {tokens} tokens a side by layers of an unknown kind, so that the positions of "
                "its tokens are unknown: it cannot be a teacher"
            )
        # Equal steps of parallel branches are one element of the set.
        if len(next_steps) > 1:
            raise ConfigError(
                f"{subject} has branches with different centres where {size} tokens a side become fewer, so that its tokens "
                "have no centre: it cannot be a teacher"
            )
        step = next_steps[0]
        # `stride` is the distance of two inputs of this layer, in pixels of the image.
        centre += step.shift * stride
        stride *= step.stride
        size = step.size_out
    return TokenCentres(float(stride), centre + 0.5)


_SAME = (Conv2dSame, AvgPool2dSame, MaxPool2dSame)
_MERGING = (PatchMerging, PatchMergingV2)
_STRIDED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, *_MERGING)


def _step(module: nn.Module, image: torch.Tensor, output: torch.Tensor) -> _Step | None:
    """Return the effect of a layer on one side of a square map; None if it keeps the size."""
    if isinstance(module, _MERGING):  # (b, h, w, c); 2 x 2 tokens become one
        return _Step(image.shape[1], output.shape[1], 2, 0.5)
    size_in, size_out = int(image.shape[-1]), int(output.shape[-1])
    if size_out >= size_in:
        return None
    layer: Any = module
    kernel, stride, padding, dilation = (
        _along_side(value) for value in (layer.kernel_size, layer.stride, layer.padding, getattr(layer, "dilation", 1))
    )
    reach = (kernel - 1) * dilation
    if isinstance(module, _SAME):  # TensorFlow pads an odd remainder on the right
        padding = max((size_out - 1) * stride + reach + 1 - size_in, 0) // 2
    return _Step(size_in, size_out, stride, reach / 2 - padding)


def _along_side(value: Any) -> int:
    """Return the value along one side of a number or a pair."""
    return int(value[0]) if isinstance(value, tuple | list) else int(value)
