"""Crop-aligned targets: a cached map of the whole image, sampled where a student's crop has its tokens."""

import torch
from jaxtyping import Float
from torch import Tensor


def crop_maps(
    maps: Float[Tensor, "b h_in w_in c"], rows: Float[Tensor, "b h_out h_in"], columns: Float[Tensor, "b w_out w_in"]
) -> Float[Tensor, "b n c"]:
    """Sample maps with the matrices of `radio_cache.geometry.crops.crop_weights`; n = h_out * w_out, row-major from
    the top left.
    """
    sampled_rows = torch.einsum("bij,bjwc->biwc", rows, maps)
    return torch.einsum("bkw,biwc->bikc", columns, sampled_rows).flatten(1, 2)
