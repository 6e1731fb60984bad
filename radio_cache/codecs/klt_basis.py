"""The Karhunen-Loeve transform that all klt codecs share: rotate tokens so that their channels are uncorrelated."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radio_cache.codecs.limits import LARGEST_FEATURE, not_finite, too_few_tokens
from radio_cache.errors import CodecError, StoreError
from radio_cache.statistics.moments import Moments

_EIGENVALUE_FLOOR = 1e-6
"""Relative to the mean eigenvalue. Keeps directions that hardly vary in the sample from being lost."""


@dataclass(frozen=True, eq=False)
class KltBasis:
    """Mean, orthonormal eigenvectors (in columns, strongest first) and eigenvalues of a teacher's tokens.

    Coordinates are y = U^T (x - mean) / phi with phi = sqrt(trace / c), so that their mean variance is 1, and
    x = mean + phi U y. PHI-S (arXiv 2410.01680) is one more rotation: its target is H y with H a Hadamard matrix.

    Args:
        mean: (c,) float32, mean token.
        basis: (c, c) float32, eigenvectors in columns.
        eigenvalues: (c,) float32, variance along each eigenvector, descending.
    """

    mean: NDArray[np.float32]
    basis: NDArray[np.float32]
    eigenvalues: NDArray[np.float32]

    @classmethod
    def fit(cls, moments: Moments) -> "KltBasis":
        """Return the basis of a sample of tokens. Directions without variance in it keep a small one.

        Raises:
            CodecError: for fewer than two tokens, tokens that are all equal, and values that are not finite.
        """
        if moments.count < 2:
            raise too_few_tokens(moments.count, "klt")
        eigenvalues, basis = moments.principal_axes()
        mean_variance = float(eigenvalues.mean())
        # `not <=` instead of `>`, here and below, so that NaN is refused, too.
        if not mean_variance <= LARGEST_FEATURE**2:
            raise not_finite(float(np.sqrt(mean_variance)))
        if not mean_variance > 0:
            raise CodecError("the teacher's tokens are all equal: there is nothing to calibrate the codec klt on")
        floored = np.maximum(eigenvalues, _EIGENVALUE_FLOOR * mean_variance)
        return cls(*(a.astype(np.float32) for a in (moments.mean, basis, floored)))

    @property
    def channels(self) -> int:
        """Number of channels c."""
        return len(self.mean)

    @property
    def matrix(self) -> NDArray[np.float64]:
        """(c, c) phi U: features = mean + matrix @ coordinates."""
        return self.phi * self.basis.astype(np.float64)

    @cached_property
    def phi(self) -> float:
        """sqrt(trace / c): the root mean square of one channel of x - mean."""
        return float(np.sqrt(self.eigenvalues.astype(np.float64).mean()))

    @cached_property
    def rotated_mean(self) -> NDArray[np.float32]:
        """U^T mean / phi: a token is phi U (rotated_mean + y), so cosines can be taken without rotating back."""
        # In float64, and rounded once: errors of the mean would be in every cosine.
        rotated = self.basis.astype(np.float64).T @ self.mean.astype(np.float64)
        return (rotated / self.phi).astype(np.float32)

    def forward(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Rotate features (..., c) to coordinates (..., c).

        Raises:
            CodecError: for NaN or infinity.
        """
        # Centred before the product: a mean much larger than the deviations would take its digits.
        rotation = (self.basis / self.phi).astype(np.float32)
        coordinates: NDArray[np.float32] = np.matmul(features - self.mean, rotation, dtype=np.float32)
        if not np.isfinite(coordinates).all():
            raise not_finite(float(np.abs(features).max()))
        return coordinates

    def inverse(self, coordinates: NDArray[np.float32]) -> NDArray[np.float32]:
        """Rotate coordinates (..., c) back to features (..., c)."""
        rotation = (self.basis.T * self.phi).astype(np.float32)
        return np.matmul(coordinates, rotation, dtype=np.float32) + self.mean

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the three arrays by their stored names."""
        return {"mean": self.mean, "basis": self.basis, "eigenvalues": self.eigenvalues}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> "KltBasis":
        """Build the basis from what `arrays` returned.

        Raises:
            StoreError: for missing arrays, shapes that do not fit together, and eigenvalues that are not positive.
        """
        try:
            basis = cls(*(np.asarray(arrays[name], np.float32) for name in ("mean", "basis", "eigenvalues")))
        except KeyError as exc:
            raise StoreError(f"codec klt: the array {exc} is missing") from exc
        shapes = [basis.mean.shape, basis.basis.shape, basis.eigenvalues.shape]
        if shapes != [(basis.mean.size,), (basis.mean.size, basis.mean.size), (basis.mean.size,)]:
            raise StoreError(f"codec klt: mean, basis and eigenvalues have shapes {shapes}, which do not fit together")
        if not basis.eigenvalues.min(initial=1) > 0:
            raise StoreError("codec klt: an eigenvalue is not positive")
        return basis
