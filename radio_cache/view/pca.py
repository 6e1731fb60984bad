"""Feature maps as colour pictures: three principal components become red, green and blue.

The usual way to look at dense features (DINOv2, arXiv 2304.07193, Fig. 1). Only maps coloured by one `PcaColours` may
be compared: with a basis of its own, every map looks good.
"""

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from radio_cache.errors import ShapeError

_COLOURS = 3
_DARKEST_PERCENTILE, _BRIGHTEST_PERCENTILE = 1.0, 99.0


@dataclass(frozen=True)
class PcaColours:
    """A basis and a colour range, fitted once and applied to every map that is to be compared.

    Attributes:
        mean: (c,) of the sample.
        basis: (c, 3) principal directions, strongest first. Each is signed so that its largest entry is positive, and
            directions beyond the rank of the sample are zero.
        low: (3,) projections that become 0.
        high: (3,) projections that become 255.
    """

    mean: NDArray[np.float64]
    basis: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @classmethod
    def fit(cls, maps: NDArray[np.floating]) -> "PcaColours":
        """Fit a basis and a colour range to maps.

        The colour range spans the 1st to the 99th percentile of each component, so that a few outlier tokens (ViTs
        have them) do not turn the rest grey. Computed in float64; deterministic.

        Args:
            maps: (..., c), such as (n, h, w, c), with at least one token.

        Raises:
            ShapeError: for no tokens or non-finite ones.
        """
        # (..., c) -> (tokens, c)
        tokens = np.asarray(maps, dtype=np.float64).reshape(-1, maps.shape[-1])
        if len(tokens) == 0 or not np.isfinite(tokens).all():
            raise ShapeError(f"colours need at least one token, and finite ones: got maps {maps.shape}")
        mean = tokens.mean(axis=0)
        centred = tokens - mean
        # (tokens, c) -> (c, c): its size does not grow with the number of maps, unlike an SVD of the tokens
        variances, directions = np.linalg.eigh(centred.T @ centred)
        order = np.argsort(-variances, kind="stable")[:_COLOURS]
        basis = np.zeros((tokens.shape[1], _COLOURS))
        basis[:, : len(order)] = directions[:, order]
        # What remains of directions without variance is rounding noise, which the colour range would blow up.
        basis[:, : len(order)] *= variances[order] > 1e-12 * max(variances.max(), np.finfo(np.float64).tiny)
        largest = basis[np.argmax(np.abs(basis), axis=0), np.arange(_COLOURS)]
        basis *= np.where(largest < 0, -1.0, 1.0)
        low, high = np.percentile(centred @ basis, [_DARKEST_PERCENTILE, _BRIGHTEST_PERCENTILE], axis=0)
        return cls(mean, basis, low, high)

    def colours(self, features: NDArray[np.floating]) -> NDArray[np.uint8]:
        """Return the RGB picture (h, w, 3) of a map.

        Values beyond the range are clipped, and components without a range are mid-grey.

        Args:
            features: (h, w, c).

        Raises:
            ShapeError: for another number of channels than in the fitted maps.
        """
        if features.shape[-1] != len(self.mean):
            raise ShapeError(f"colours were fitted to {len(self.mean)} channels, the map is {features.shape}")
        span = self.high - self.low
        # (h, w, c) -> (h, w, 3)
        projected = (np.asarray(features, dtype=np.float64) - self.mean) @ self.basis
        position = np.where(span > 0, (projected - self.low) / np.where(span > 0, span, 1.0), 0.5)
        return np.round(np.clip(position, 0.0, 1.0) * 255.0).astype(np.uint8)


def png_bytes(picture: NDArray[np.uint8]) -> bytes:
    """Return a PNG file of an (h, w, 3) picture."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
