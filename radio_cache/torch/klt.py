"""`radio_cache.codecs.klt_basis` on the device: the rotation that all klt codecs share."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from radio_cache.codecs.klt_basis import KltBasis
from radio_cache.codecs.limits import not_finite
from radio_cache.torch.base import Encoded, largest_magnitude, measured


class KltForward:
    """Features to coordinates, and the measurement of decoded coordinates."""

    def __init__(self, basis: KltBasis, device: torch.device) -> None:
        self._mean = torch.from_numpy(basis.mean).to(device)
        # Divided in float64 and rounded once.
        self._rotation = (torch.from_numpy(basis.basis).to(device).double() / basis.phi).float()
        self._rotated_mean = torch.from_numpy(basis.rotated_mean).to(device)
        self._phi = basis.phi

    def coordinates(self, features: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """Rotate features to coordinates.

        Raises:
            CodecError: for NaN or infinity.
        """
        coordinates = (features - self._mean) @ self._rotation
        if not math.isfinite(largest_magnitude(coordinates)):
            raise not_finite(largest_magnitude(features))
        return coordinates

    def measured(self, codes: Tensor, coordinates: Tensor, decoded: Tensor) -> Encoded:
        """Measure coordinates instead of features: a rotation changes no angle, and lengths by phi alone."""
        return measured(codes, coordinates + self._rotated_mean, decoded + self._rotated_mean, self._phi)


class KltInverse:
    """Coordinates to features."""

    def __init__(self, basis: KltBasis, device: torch.device) -> None:
        self._mean = torch.from_numpy(basis.mean).to(device)
        self._rotation = (torch.from_numpy(basis.basis).to(device).double().T * basis.phi).float()

    def features(self, coordinates: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch c"]:
        """Rotate coordinates back to features."""
        return coordinates @ self._rotation + self._mean
