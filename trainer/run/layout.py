"""The memory layout of a run's tensors: channels last where that is known to be correct."""

import torch

from trainer.recipes.recipe import Recipe
from trainer.students import ERadio, Student


def memory_layout(student: Student, recipe: Recipe, device: torch.device) -> torch.memory_format:
    """Return the memory layout of a run's weights and images.

    On a CPU, `channels_last` is used for E-RADIO alone, whose few kinds of layers are tested in it. With it, PyTorch's CPU code
    writes out of bounds in the backward pass of a 1x1 convolution of stride 2 on fewer than 16 channels
    (uxlfoundation/oneDNN#6035), as FastViT, RepVGG and MobileOne begin with: the process crashes, or weights are not finite.
    """
    # Sharded weights are split along their first axis, for which they have to be contiguous.
    if not recipe.channels_last or recipe.fsdp:
        return torch.contiguous_format
    if device.type == "cpu" and not isinstance(student, ERadio):
        return torch.contiguous_format
    return torch.channels_last
