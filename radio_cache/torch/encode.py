"""Encoding of feature maps on the device, as a build does it."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from radio_cache.codecs import Codec, label_of
from radio_cache.errors import UnsupportedFormatError
from radio_cache.torch.base import Encoded
from radio_cache.torch.registry import DEVICE_CODECS

_CACHED_VALUES = 1 << 18
"""Values encoded together on a CPU: what stays in a core's cache is encoded in half the time."""


class MapEncoder:
    """Encode maps (b, h, w, c) with one codec on one device, and measure the loss, in one pass.

    Raises:
        UnsupportedFormatError: if the codec has no encoder for tensors.
    """

    def __init__(self, codec: Codec, device: torch.device) -> None:
        label = label_of(codec)
        if label not in DEVICE_CODECS:
            raise UnsupportedFormatError(f"codec '{label}' has no encoder for tensors")
        self._device = device
        self._encoder = DEVICE_CODECS[label].encoder(codec, device)

    def __call__(self, features: Float[Tensor, "b h w c"]) -> Encoded:
        """Encode maps to the codes of the codec's own `encode`, up to float32 rounding of matrix products.

        Raises:
            CodecError: for values outside the codec's error bound, as `codec.encode` does.
        """
        batch = max(1, _CACHED_VALUES // max(1, math.prod(features.shape[1:])))
        if self._device.type != "cpu" or len(features) <= batch:
            return self._encoder.encode(features)
        parts = [self._encoder.encode(part) for part in features.split(batch)]
        return Encoded(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.cosines for part in parts]),
            torch.cat([part.squared_errors for part in parts]),
        )
