"""PHI-S and the normalisations that its paper compares it with.

Teachers differ in scale by orders of magnitude, and so do channels of one teacher. Each normalisation here is an
affine map fitted to the moments of a teacher's tokens: mean mu, covariance U L U^T, c channels.

| name        | forward                        | covariance afterwards                                     |
|-------------|--------------------------------|-----------------------------------------------------------|
| global      | (x - mu_g) / sigma_g           | scaled; all values together have mean 0 and variance 1    |
| standardise | (x - mu) / sigma, per channel  | unit diagonal                                             |
| pca         | L^-1/2 U^T (x - mu)            | identity                                                  |
| zca         | U L^-1/2 U^T (x - mu)          | identity; nearest to the features                         |
| hadamard    | H L^-1/2 U^T (x - mu)          | identity                                                  |
| phi-s       | H U^T (x - mu) / phi           | unit diagonal; one scale for all directions               |

phi = sqrt(trace / c), H an orthonormal Hadamard matrix. Whitening divides by the deviation of every direction, so errors in
weak directions weigh as much as errors in strong ones, and explode on the way back. PHI-S only rotates and scales: distances
keep their proportions, and as every entry of H has the same size, every channel gets the mean variance: exactly 1.

Source: M. Ranzinger et al., "PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation", arXiv 2410.01680.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import MomentsError, ShapeError
from radio_cache.statistics.hadamard import hadamard
from radio_cache.statistics.moments import Moments

__all__ = [
    "NORMALISATIONS",
    "Affine",
    "global_standardise",
    "hadamard_whiten",
    "pca_whiten",
    "phi_s",
    "standardise",
    "zca_whiten",
]

Matrix = NDArray[np.float64]

_FLOOR = 1e-6
"""Smallest variance of a direction, relative to the mean variance.

A direction that hardly varies in the sample has a variance of rounding and chance: divided by its root, noise would become
the loudest target. The floor limits the amplification by whitening to a thousandfold and keeps every map invertible. PHI-S
and `global` divide by no single direction's variance and need none."""


@dataclass(frozen=True, eq=False)
class Affine:
    """The affine map y = matrix (x - shift), with x = inverse_matrix y + shift, in float64 for any input type.

    Args:
        shift: (c,) in the teacher's units.
        matrix: (c, c).
        inverse_matrix: (c, c) in closed form, not by a solver.
    """

    shift: NDArray[np.float64]
    matrix: Matrix
    inverse_matrix: Matrix

    def forward(self, features: NDArray[Any]) -> NDArray[np.float64]:
        """Map features (..., c) to targets (..., c).

        Raises:
            ShapeError: for another number of channels.
        """
        return (self._checked(features) - self.shift) @ self.matrix.T

    def inverse(self, targets: NDArray[Any]) -> NDArray[np.float64]:
        """Map targets (..., c) back to features (..., c).

        Raises:
            ShapeError: for another number of channels.
        """
        return self._checked(targets) @ self.inverse_matrix.T + self.shift

    def _checked(self, values: NDArray[Any]) -> NDArray[np.float64]:
        if values.shape[-1:] != self.shift.shape:
            raise ShapeError(f"normalisation of {len(self.shift)} channels, applied to values of shape {values.shape}")
        return values.astype(np.float64)


def global_standardise(moments: Moments) -> Affine:
    """Fit one mean and one deviation to all values of all channels.

    Raises:
        MomentsError: if no channel varies.
    """
    _mean_variance(moments)
    mean = float(moments.mean.mean())
    # Variance of all values together: within channels, and between their means.
    sigma = float(np.sqrt((np.diag(moments.covariance) + np.square(moments.mean - mean)).mean()))
    unit = np.eye(moments.channels)
    return Affine(np.full(moments.channels, mean), unit / sigma, unit * sigma)


def standardise(moments: Moments) -> Affine:
    """Fit a mean and a deviation to every channel.

    Raises:
        MomentsError: if no channel varies.
    """
    sigma = np.sqrt(np.maximum(np.diag(moments.covariance), _FLOOR * _mean_variance(moments)))
    return Affine(moments.mean, np.diag(1 / sigma), np.diag(sigma))


def pca_whiten(moments: Moments) -> Affine:
    """Fit PCA whitening: principal components, each of unit variance, strongest first.

    Raises:
        MomentsError: if no channel varies.
    """
    deviations, axes = _deviations(moments)
    return _whitened(moments.mean, deviations, axes, np.eye(moments.channels))


def zca_whiten(moments: Moments) -> Affine:
    """Fit ZCA whitening: of all whitened features, those nearest to the centred features.

    Raises:
        MomentsError: if no channel varies.
    """
    deviations, axes = _deviations(moments)
    # U after L^-1/2 U^T rotates the components back to the channels.
    return _whitened(moments.mean, deviations, axes, axes)


def hadamard_whiten(moments: Moments) -> Affine:
    """Fit Hadamard whitening: every principal component is spread evenly over all channels.

    Raises:
        MomentsError: if no channel varies.
        HadamardError: for widths without a known Hadamard matrix.
    """
    deviations, axes = _deviations(moments)
    return _whitened(moments.mean, deviations, axes, hadamard(moments.channels))


def phi_s(moments: Moments) -> Affine:
    """Fit PCA-Hadamard isotropic standardisation: a rotation that gives all channels equal variance, and one scale.

    Of klt codes q the target is `step * H q`: their coordinates are U^T (x - mu) / phi already.

    Raises:
        MomentsError: if no channel varies.
        HadamardError: for widths without a known Hadamard matrix.

    Source: arXiv 2410.01680.
    """
    phi = np.sqrt(_mean_variance(moments))
    # (c, c): orthonormal, so that its inverse is its transpose
    rotation = hadamard(moments.channels) @ moments.principal_axes()[1].T
    return Affine(moments.mean, rotation / phi, rotation.T * phi)


NORMALISATIONS: Final[dict[str, Callable[[Moments], Affine]]] = {
    "global": global_standardise,
    "standardise": standardise,
    "pca": pca_whiten,
    "zca": zca_whiten,
    "hadamard": hadamard_whiten,
    "phi-s": phi_s,
}
"""Name in a recipe -> function that fits it."""


def _mean_variance(moments: Moments) -> float:
    variance = float(np.trace(moments.covariance)) / moments.channels
    if not np.isfinite(variance):
        raise MomentsError("the sampled tokens hold NaN or infinity: run the teacher with --dtype float32")
    if variance <= 0:
        raise MomentsError(
            f"no channel varies over the {moments.count} sampled tokens: there is nothing to normalise by; sample more images"
        )
    return variance


def _deviations(moments: Moments) -> tuple[NDArray[np.float64], Matrix]:
    """Return the standard deviation (c,) along every principal axis, floored, and the axes (c, c) in columns."""
    # Floored: see `_FLOOR`. Directions above the floor keep their measured variance.
    floor = _FLOOR * _mean_variance(moments)
    eigenvalues, axes = moments.principal_axes()
    return np.sqrt(np.maximum(eigenvalues, floor)), axes


def _whitened(mean: NDArray[np.float64], deviations: NDArray[np.float64], axes: Matrix, rotation: Matrix) -> Affine:
    """Return the map rotation L^-1/2 U^T, whose inverse is U L^1/2 rotation^T: U and the rotation are orthonormal."""
    return Affine(mean, rotation @ (axes / deviations).T, (axes * deviations) @ rotation.T)
