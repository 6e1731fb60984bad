"""Calibration steps that all klt codecs share."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from radio_cache.codecs.base import CalibrationSample, CalibrationTarget
from radio_cache.codecs.klt_basis import KltBasis
from radio_cache.errors import CodecError
from radio_cache.statistics.fidelity import Fidelity, measure_fidelity


@dataclass(frozen=True, eq=False)
class KltSample:
    """A calibration sample in the coordinates of its basis.

    Args:
        coordinates: (n, c) coordinates of calibration tokens.
        held_out: (m, c) coordinates of tokens of other images.
    """

    basis: KltBasis
    coordinates: NDArray[np.float32]
    held_out: NDArray[np.float32]

    @classmethod
    def of(cls, sample: CalibrationSample) -> "KltSample":
        """Fit the basis to the sample's moments, unless the sample is given in a basis.

        Raises:
            CodecError: if the moments have no basis.
        """
        if sample.basis is not None:
            # Stored coordinates are rotated already: rotating back and forth would only round them.
            return cls(sample.basis, sample.tokens, sample.held_out)
        if sample.moments is None:
            raise ValueError("a calibration sample has neither moments nor a basis")
        basis = KltBasis.fit(sample.moments)
        return cls(basis, basis.forward(sample.tokens), basis.forward(sample.held_out))

    def fidelity_of(self, decoded: NDArray[np.float32]) -> Fidelity:
        """Measure decoded coordinates (m, c) of the held-out tokens.

        The fidelity equals that of the features, since a rotation changes no angle and no ratio of lengths.
        """
        return measure_fidelity(self.held_out + self.basis.rotated_mean, decoded + self.basis.rotated_mean)


def smallest_enough(is_enough: Callable[[int], bool], largest: int) -> int:
    """Return the smallest number up to `largest` that is enough, or `largest` + 1 if none is.

    Args:
        is_enough: a monotone condition, evaluated about log2(`largest`) times.
        largest: the largest number that is tried.
    """
    low, high = 0, largest + 1
    while low < high:
        middle = (low + high) // 2
        if is_enough(middle):
            high = middle
        else:
            low = middle + 1
    return low


def refuse_if_below(target: CalibrationTarget, best: Fidelity) -> None:
    """Raise CodecError if the best fidelity of a codec is below the target."""
    if best.cosine < target.cosine:
        raise CodecError(
            f"klt cannot reach fidelity {target.fidelity:g} on this teacher: its finest setting has a mean cosine of "
            f"{best.cosine:.5f} on held-out images. Request a lower fidelity, calibrate on more images, or take --codec half"
        )
