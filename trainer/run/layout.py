"""The memory layout in which a run computes: channels last where it is known to be right."""

import torch

from trainer.recipes.recipe import Recipe
from trainer.students import ERadio, Student


def memory_layout(student: Student, recipe: Recipe, device: torch.device) -> torch.memory_format:
    """Return the layout of a run's weights and images.

    On a CPU, `channels_last` holds for E-RADIO alone, whose few kinds of layers are tested in it. Networks of timm compute
    in the plain layout there. Where channels come last, PyTorch's CPU library writes past its memory in the backward pass of a
    1x1 convolution of stride 2 on fewer than 16 channels (uxlfoundation/oneDNN#6035), as FastViT, RepVGG and MobileOne begin
    with: the process crashes, or weights are not finite.
    """
    # Divided weights are cut along their first axis, for which they have to lie in order.
    if not recipe.channels_last or recipe.fsdp:
        return torch.contiguous_format
    if device.type == "cpu" and not isinstance(student, ERadio):
        return torch.contiguous_format
    return torch.channels_last
