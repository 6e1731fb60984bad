"""PHI-S and the normalisations it is compared with (M. Ranzinger et al., arXiv 2410.01680): a teacher's tokens made comparable.

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
weak directions weigh as much as errors in strong ones, and explode on the way back. PHI-S turns and scales, no more: distances
keep their proportions, and as every entry of H has the same size, every channel gets the mean variance: exactly 1.
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
"""Of the mean variance. A direction that calibration hardly saw has a variance that is mostly rounding and chance;
divided by its root, noise would become the loudest target. The floor bounds what whitening amplifies to a thousandfold
and keeps every map invertible; directions above it are not touched. PHI-S and `global` divide by no single direction's
variance and need none."""


@dataclass(frozen=True, eq=False)
class Affine:
    """y = matrix (x - shift), and back: x = inverse_matrix y + shift. In float64 whatever comes in.

    shift (c,), in the teacher's units; matrix (c, c); inverse_matrix (c, c), in closed form, not by a solver.
    """

    shift: NDArray[np.float64]
    matrix: Matrix
    inverse_matrix: Matrix

    def forward(self, features: NDArray[Any]) -> NDArray[np.float64]:
        """Features (..., c) to targets (..., c). Raises ShapeError for another number of channels."""
        return (self._checked(features) - self.shift) @ self.matrix.T

    def inverse(self, targets: NDArray[Any]) -> NDArray[np.float64]:
        """Targets (..., c) back to features (..., c). Raises ShapeError for another number of channels."""
        return self._checked(targets) @ self.inverse_matrix.T + self.shift

    def _checked(self, values: NDArray[Any]) -> NDArray[np.float64]:
        if values.shape[-1:] != self.shift.shape:
            raise ShapeError(f"normalisation of {len(self.shift)} channels, applied to values of shape {values.shape}")
        return values.astype(np.float64)


def global_standardise(moments: Moments) -> Affine:
    """One mean and one deviation for all values of all channels. Raises MomentsError if all values are equal."""
    _mean_variance(moments)
    mean = float(moments.mean.mean())
    sigma = float(np.sqrt((np.diag(moments.covariance) + np.square(moments.mean - mean)).mean()))
    unit = np.eye(moments.channels)
    return Affine(np.full(moments.channels, mean), unit / sigma, unit * sigma)


def standardise(moments: Moments) -> Affine:
    """Every channel by its own mean and deviation. Raises MomentsError if no channel varies."""
    sigma = np.sqrt(np.maximum(np.diag(moments.covariance), _FLOOR * _mean_variance(moments)))
    return Affine(moments.mean, np.diag(1 / sigma), np.diag(sigma))


def pca_whiten(moments: Moments) -> Affine:
    """Principal components, each of unit variance, strongest first. Raises MomentsError if no channel varies."""
    deviations, axes = _deviations(moments)
    return _whitened(moments.mean, deviations, axes, np.eye(moments.channels))


def zca_whiten(moments: Moments) -> Affine:
    """Whitened, then turned back: of all whitened features those nearest to the centred ones. Raises MomentsError alike."""
    deviations, axes = _deviations(moments)
    return _whitened(moments.mean, deviations, axes, axes)


def hadamard_whiten(moments: Moments) -> Affine:
    """Whitened, then every component spread over all channels. Raises MomentsError alike, and HadamardError for widths
    that have no Hadamard matrix."""
    deviations, axes = _deviations(moments)
    return _whitened(moments.mean, deviations, axes, hadamard(moments.channels))


def phi_s(moments: Moments) -> Affine:
    """PCA-Hadamard isotropic standardisation: rotated so that all channels have equal variance, scaled to make it 1.

    Raises MomentsError if no channel varies, HadamardError for widths that have no Hadamard matrix.
    From klt codes q it is `step * H q`: their coordinates are U^T (x - mu) / phi already.
    """
    phi = np.sqrt(_mean_variance(moments))
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
"""Name -> how to fit it; the names of the table above."""


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
    """Standard deviation (c,) along every principal axis, floored, and the axes (c, c) in columns."""
    floor = _FLOOR * _mean_variance(moments)
    eigenvalues, axes = moments.principal_axes()
    return np.sqrt(np.maximum(eigenvalues, floor)), axes


def _whitened(mean: NDArray[np.float64], deviations: NDArray[np.float64], axes: Matrix, rotation: Matrix) -> Affine:
    """rotation L^-1/2 U^T; its inverse is U L^1/2 rotation^T, since both U and the rotation are orthonormal."""
    return Affine(mean, rotation @ (axes / deviations).T, (axes * deviations) @ rotation.T)
