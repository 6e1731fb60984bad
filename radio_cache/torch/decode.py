"""Stored codes to features, on the device."""

import torch
from jaxtyping import Float
from torch import Tensor

from radio_cache.codecs import Codec, Half
from radio_cache.errors import UnsupportedFormatError


def decode_codes(codec: Codec, codes: Tensor) -> Float[Tensor, "*batch c"]:
    """The same values as `codec.decode`, as a float32 tensor on the codes' device."""
    if isinstance(codec, Half):
        return codes.to(torch.float32)
    raise UnsupportedFormatError(f"codec '{codec.name}' has no decoder for tensors")
