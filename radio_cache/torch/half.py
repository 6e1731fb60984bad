"""`radio_cache.codecs.half` on the device."""

import torch
from jaxtyping import Float
from torch import Tensor

from radio_cache.codecs import Half
from radio_cache.codecs.half import beyond_half
from radio_cache.torch.base import Encoded, largest_magnitude, measured


class HalfEncoder:
    """Round to float16."""

    def __init__(self, codec: Half, device: torch.device) -> None:
        del codec, device  # half has no parameters

    def encode(self, features: Float[Tensor, "b h w c"]) -> Encoded:
        """Round maps to float16."""
        codes = features.to(torch.float16)
        if not bool(torch.isfinite(codes).all()):
            raise beyond_half(largest_magnitude(features))
        return measured(codes, features, codes.float())


class HalfDecoder:
    """Widen float16 to float32."""

    def __init__(self, codec: Half, device: torch.device) -> None:
        del codec, device  # half has no parameters

    def coordinates(self, codes: Tensor) -> Float[Tensor, "b h w c"]:
        """Return features in float32."""
        return codes.to(torch.float32)

    def features(self, coordinates: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch c"]:
        """Return the coordinates, which are features."""
        return coordinates

    def axis_transforms(self, grid_hw: tuple[int, int]) -> None:
        """Return None: coordinates are those of tokens."""
        return
