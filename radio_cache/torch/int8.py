"""`radio_cache.codecs.int8` on the device."""

import torch
from jaxtyping import Float
from torch import Tensor

from radio_cache.codecs import Int8
from radio_cache.codecs.int8 import LARGEST, MAX_EXPONENT
from radio_cache.codecs.limits import LARGEST_FEATURE, not_finite
from radio_cache.torch.base import Encoded, largest_magnitude, measured


class Int8Encoder:
    """Scale per channel, exponent per token."""

    def __init__(self, codec: Int8, device: torch.device) -> None:
        self._scale = torch.from_numpy(codec.scale).to(device)

    def encode(self, features: Float[Tensor, "b h w c"]) -> Encoded:
        """Encode maps to (b, h, w, c + 1) codes."""
        scaled = features / self._scale
        largest = scaled.abs().amax(dim=-1, keepdim=True)  # (b, h, w, 1)
        magnitude = largest_magnitude(features)
        if not magnitude <= LARGEST_FEATURE or not largest_magnitude(largest) < LARGEST * 2.0**MAX_EXPONENT:
            raise not_finite(magnitude)
        # frexp is exact, as in `Int8.encode`: 2^exponent is the smallest power of two above largest / 127.
        exponent = torch.frexp(largest / LARGEST)[1].clamp(min=0)
        exponent = torch.where(largest < LARGEST + 0.5, torch.zeros_like(exponent), exponent)
        codes = torch.round(torch.ldexp(scaled, -exponent))
        decoded = torch.ldexp(codes, exponent) * self._scale
        # (b, h, w, c) and (b, h, w, 1) -> (b, h, w, c + 1)
        return measured(torch.cat([codes, exponent.to(codes.dtype)], dim=-1).to(torch.int8), features, decoded)


class Int8Decoder:
    """Multiply by the scales and the token's power of two."""

    def __init__(self, codec: Int8, device: torch.device) -> None:
        self._scale = torch.from_numpy(codec.scale).to(device)

    def coordinates(self, codes: Tensor) -> Float[Tensor, "b h w c"]:
        """Decode codes (b, h, w, c + 1) to features."""
        return torch.ldexp(codes[..., :-1].float(), codes[..., -1:].clamp(min=0).int()) * self._scale

    def features(self, coordinates: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch c"]:
        """Return the coordinates, which are features."""
        return coordinates

    def axis_transforms(self, grid_hw: tuple[int, int]) -> None:
        """Return None: coordinates are those of tokens."""
        return
