"""The interfaces of a codec's encoder and decoder on a device, and the measurement that all encoders share."""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Encoded:
    """Encoded maps and what encoding lost of them.

    Args:
        codes: (b, *row_shape) on the device.
        cosines: (b, h, w) cosine of every decoded token and the true one.
        squared_errors: (b, h, w) squared distance of every decoded token and the true one, summed over channels.
    """

    codes: Tensor
    cosines: Float[Tensor, "b h w"]
    squared_errors: Float[Tensor, "b h w"]


class DeviceEncoder(Protocol):
    """Encode maps with one codec on one device. Built from the codec and the device."""

    def encode(self, features: Float[Tensor, "b h w c"], /) -> Encoded:
        """Encode maps to the codes of the codec's own `encode`, up to float32 rounding of matrix products.

        Raises:
            CodecError: for values outside the codec's error bound, with the message of the codec's own `encode`.
        """
        ...


class DeviceDecoder(Protocol):
    """Decode one codec's codes on one device, in steps that are affine in the map. Built from the codec and the device.

    A crop is interpolated between the steps, so that only the tokens of the crop pass through the later ones.
    """

    def coordinates(self, codes: Tensor, /) -> Float[Tensor, "b h w c"]:
        """Decode codes (b, *row_shape) to float32 coordinates, which may be coefficients along the map's axes."""
        ...

    def features(self, coordinates: Float[Tensor, "*batch c"], /) -> Float[Tensor, "*batch c"]:
        """Turn coordinates of tokens into the teacher's features: the codec's `channel_transform`."""
        ...

    def axis_transforms(self, grid_hw: tuple[int, int], /) -> tuple[Float[Tensor, "h k"], Float[Tensor, "w l"]] | None:
        """Return the matrices that turn coefficients along rows and columns into tokens; None if coordinates are tokens.

        The coordinates of token (i, j) are the sum over k and l of rows[i, k] * columns[j, l] * coefficients[k, l].
        """
        ...


def largest_magnitude(values: Tensor) -> float:
    """Return the largest magnitude, NaN if there is one, and 0 for no values at all."""
    return float(values.abs().max()) if values.numel() else 0.0


def measured(codes: Tensor, true: Tensor, decoded: Tensor, scale: float = 1.0) -> Encoded:
    """Return codes with the cosines and squared errors of their decoded values.

    Args:
        codes: (b, *row_shape), as they are stored.
        true: (b, h, w, c) values that were encoded: features, or coordinates with their rotated mean.
        decoded: (b, h, w, c) the same after decoding.
        scale: units of a feature per unit of these values.
    """
    true_lengths, decoded_lengths = true.norm(dim=-1), decoded.norm(dim=-1)
    lengths = true_lengths * decoded_lengths
    # Two zero vectors agree. A zero vector and another one do not.
    both_zero = (true_lengths == decoded_lengths).float()
    cosines = torch.where(lengths > 0, (true * decoded).sum(-1) / lengths.clamp(min=1e-30), both_zero)
    return Encoded(codes, cosines, (true - decoded).square().sum(-1) * scale**2)
