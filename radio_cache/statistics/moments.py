"""Count, mean and scatter of a stream of tokens, which codecs are calibrated on and normalisations are fitted to.

A sample of a hundred million tokens does not fit in memory, so it is read in pieces, possibly by several workers. Each
piece gives one `Moments`, and pieces merge.

Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979. Their
formula never subtracts large numbers from each other, as sums of squares do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Self, final

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import ShapeError


@final
@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of `count` tokens of c channels, in float64.

    Two halves merged are the whole, in any order, up to float64 rounding. A byte-exact result needs the same pieces
    merged in the same order: merge by shard number, never in the order of completion.

    Args:
        count: number of tokens.
        mean: (c,) in the teacher's units; zeros for no tokens.
        scatter: (c, c) sum over tokens of the outer product of their deviation from the mean.
    """

    count: int
    mean: NDArray[np.float64]
    scatter: NDArray[np.float64]

    def __post_init__(self) -> None:
        channels = self.mean.size
        if self.mean.shape != (channels,) or self.scatter.shape != (channels, channels):
            raise ShapeError(
                f"moments with a mean of shape {self.mean.shape} and a scatter of shape {self.scatter.shape}: "
                "they must be (c,) and (c, c)."
            )

    @classmethod
    def empty(cls, channels: int) -> Self:
        """Return the moments of no tokens: merging them changes nothing."""
        return cls(0, np.zeros(channels), np.zeros((channels, channels)))

    @classmethod
    def of(cls, tokens: NDArray[Any]) -> Self:
        """Return the moments of tokens (n, c).

        Args:
            tokens: of any real type; n may be 0.

        Raises:
            ShapeError: if there are more or fewer than two axes.
        """
        if tokens.ndim != 2:
            raise ShapeError(f"moments need tokens of shape (n, c), these have shape {tokens.shape}: flatten the maps.")
        if tokens.shape[0] == 0:
            return cls.empty(tokens.shape[1])
        # One float64 copy of the piece is all the memory used: the subtractions below are in place.
        deviations = np.array(tokens, np.float64, order="C")
        mean = deviations.mean(axis=0)
        deviations -= mean
        # The mean above is rounded: the mean of the deviations is its error.
        correction = deviations.mean(axis=0)
        deviations -= correction
        scatter = deviations.T @ deviations
        # Exactly symmetric, whatever the order in which BLAS adds.
        return cls(len(tokens), mean + correction, (scatter + scatter.T) / 2)

    @property
    def channels(self) -> int:
        """Number of channels c."""
        return self.mean.size

    @property
    def covariance(self) -> NDArray[np.float64]:
        """(c, c) covariance of the population: scatter / count; zeros for no tokens."""
        return self.scatter / max(self.count, 1)

    def principal_axes(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the eigenvalues (c,) of the covariance, largest first, and its eigenvectors (c, c) in columns.

        Negative eigenvalues, which only rounding makes, are set to 0. The largest entry of each eigenvector is positive.
        """
        eigenvalues, axes = np.linalg.eigh(self.covariance)
        order = np.argsort(-eigenvalues, kind="stable")
        axes = axes[:, order]
        # The sign of an eigenvector is the solver's choice: fix it, so that every machine stores the same basis.
        signs = np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(self.channels)])
        return np.maximum(eigenvalues[order], 0.0), axes * signs

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of the tokens of both.

        Raises:
            ShapeError: if the numbers of channels differ.
        """
        if self.channels != other.channels:
            raise ShapeError(
                f"moments of {self.channels} and of {other.channels} channels cannot be merged: they are of different teachers."
            )
        if other.count == 0 or self.count == 0:
            return self if other.count == 0 else other
        count = self.count + other.count
        delta = other.mean - self.mean
        # Symmetric in both operands, so that a.merge(b) and b.merge(a) are equal to the last bit.
        mean = (self.mean * self.count + other.mean * other.count) / count
        scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.count * other.count / count)
        return Moments(count, mean, scatter)


def merge_all(parts: Sequence[Moments]) -> Moments:
    """Return the moments of the tokens of all parts, merged in their order. There is at least one part."""
    return reduce(Moments.merge, parts)


def cross_validated(parts: Sequence[Moments]) -> Moments:
    """Return moments of all parts, with eigenvalues that the parts measure along each other's principal axes.

    A sample's own weakest directions are those in which it happens to vary little: whitened by their sample variance, other
    images vary by more than 1 (by 8 % on 1,000 photos of 49 tokens, 320 channels). So an eigenvalue is the variance of each
    part along the axis of that rank of all other parts, averaged. Mean, axes and trace stay those of the whole.

    Args:
        parts: disjoint, at least two of them with tokens; each token of an image in the same part, because tokens of one image
            resemble each other.

    Source: D. Bartz, Cross-validation based nonlinear shrinkage, arXiv 1611.00798, after C. Lam, Nonparametric eigenvalue-
        regularized precision or covariance matrix estimator, Annals of Statistics 44 (2016).
    """
    parts = [part for part in parts if part.count]
    whole = merge_all(parts)
    sums = np.zeros(whole.channels)
    for number, part in enumerate(parts):
        # The variance of this part along axes that it has no share in.
        axes = merge_all([*parts[:number], *parts[number + 1 :]]).principal_axes()[1]
        sums += np.einsum("ji,jk,ki->i", axes, part.scatter, axes, optimize=True)
    # Noise may swap neighbours, and the axes of the whole are in descending order.
    eigenvalues = np.sort(sums)[::-1] / whole.count
    sample_eigenvalues, axes = whole.principal_axes()
    total = float(eigenvalues.sum())
    if total <= 0:
        return whole
    # The trace is the total variance, which a sample measures without bias.
    eigenvalues = eigenvalues * (sample_eigenvalues.sum() / total)
    return Moments(whole.count, whole.mean, (axes * eigenvalues) @ axes.T * whole.count)


def power_sums(features: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return the sums and the sums of squares (2, c) over all but the last axis of features (..., c), in float64."""
    flat = features.reshape(-1, features.shape[-1]).astype(np.float64)
    return np.stack([flat.sum(axis=0), np.square(flat).sum(axis=0)])
