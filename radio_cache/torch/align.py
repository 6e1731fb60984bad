"""Crop-aligned targets: a cached map of the whole image, sampled at the tokens of a student's crop."""

import torch
from jaxtyping import Float
from torch import Tensor


def crop_maps(
    maps: Float[Tensor, "b h_in w_in c"], rows: Float[Tensor, "b h_out h_in"], columns: Float[Tensor, "b w_out w_in"]
) -> Float[Tensor, "b n c"]:
    """Sample maps at the tokens of crops.

    Args:
        maps: one map per crop, of the whole image.
        rows: interpolation weights of `radio_cache.geometry.crops.crop_weights`, from top to bottom.
        columns: the same, from left to right.

    Returns:
        The crops' tokens; n = h_out * w_out, row-major from the top left.
    """
    # Interpolation is separable: (b, h_in, w_in, c) -> (b, h_out, w_in, c) -> (b, h_out, w_out, c).
    sampled_rows = torch.einsum("bij,bjwc->biwc", rows, maps)
    return torch.einsum("bkw,biwc->bikc", columns, sampled_rows).flatten(1, 2)
