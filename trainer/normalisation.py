"""What teachers' features are brought to before they are targets, by name, and how to undo it in a trained head.

"none" leaves them; "standardise" uses the mean and deviation per channel that the cache recorded while it was built; the
others (`radio_cache.phi_s`) need a covariance, which a klt cache has and which is else taken of a seeded sample of its maps.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from radio_cache.codecs import KltPacked, KltZstd
from radio_cache.crops import valid_tokens
from radio_cache.moments import Moments
from radio_cache.phi_s import NORMALISATIONS
from radio_cache.reader import Cache
from radio_cache.torch import MapDecoder
from trainer.adaptors import Head, fold_into_last
from trainer.recipe import Normalise

_SAMPLED_IMAGES, _SAMPLED_SUMMARIES, _AT_ONCE = 256, 16_384, 16


@dataclass(frozen=True)
class PerChannel:
    """y = (x - mean) / std, channel by channel."""

    mean: Float[Tensor, " c"]
    std: Float[Tensor, " c"]

    def __call__(self, features: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        return (features - self.mean) / self.std

    def fold_into(self, head: Head) -> None:
        """Make a head that learnt these targets speak the teacher's units."""
        fold_into_last(head, self.std, self.mean)

    @classmethod
    def of(cls, mean: NDArray[np.float64], std: NDArray[np.float64], device: torch.device) -> "PerChannel":
        # A channel that never moves carries nothing; dividing by its deviation would only amplify rounding.
        floor = max(1e-6, 1e-3 * float(np.median(std)))
        return cls(*(torch.from_numpy(a).to(device, torch.float32) for a in (mean, np.maximum(std, floor))))


@dataclass(frozen=True)
class Rotated:
    """y = matrix (x - shift), and back by the inverse."""

    shift: Float[Tensor, " c"]
    matrix: Float[Tensor, "c c"]
    inverse: Float[Tensor, "c c"]

    def __call__(self, features: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        return (features - self.shift) @ self.matrix.T

    def fold_into(self, head: Head) -> None:
        """Make a head that learnt these targets speak the teacher's units: W <- M^-1 W, b <- M^-1 b + shift."""
        fold_into_last(head, self.inverse, self.shift)

    @classmethod
    def of(cls, name: str, moments: Moments, device: torch.device) -> "Rotated":
        """Raises MomentsError for features that do not vary, HadamardError for widths without a Hadamard matrix."""
        affine = NORMALISATIONS[name](moments)
        parts = (affine.shift, affine.matrix, affine.inverse_matrix)
        return cls(*(torch.from_numpy(np.ascontiguousarray(a)).to(device, torch.float32) for a in parts))


Normaliser = PerChannel | Rotated


def spatial_normaliser(
    cache: Cache, teacher: str, how: Normalise, rows: NDArray[np.int64], seed: int, device: torch.device
) -> Normaliser | None:
    """For a teacher's maps. rows: the images to sample from, if there is anything to sample."""
    cached = cache.teachers[teacher]
    if how == "none":
        return None
    if how == "standardise":
        return PerChannel.of(*cached.spatial_mean_std(), device)
    if isinstance(cached.codec, KltZstd | KltPacked):
        basis = cached.codec.basis
        axes = basis.basis.astype(np.float64)
        covariance = (axes * basis.eigenvalues.astype(np.float64)) @ axes.T
        return Rotated.of(how, Moments(1, basis.mean.astype(np.float64), covariance), device)
    moments = Moments.empty(cached.spec.spatial_dim)
    sampled = _sample(rows, _SAMPLED_IMAGES, seed)
    for first in range(0, len(sampled), _AT_ONCE):
        some = sampled[first : first + _AT_ONCE]
        for row, features in zip(some, cached.maps(some), strict=True):
            h, w = cache.sizes_hw[row]
            moments = moments.merge(Moments.of(features[valid_tokens((int(h), int(w)), cached.spec.geometry)]))
    return Rotated.of(how, moments, device)


def summary_normaliser(
    cache: Cache, teacher: str, how: Normalise, rows: NDArray[np.int64], seed: int, device: torch.device
) -> Normaliser | None:
    """For a teacher's summaries."""
    cached = cache.teachers[teacher]
    if how == "none":
        return None
    if how == "standardise":
        return PerChannel.of(*cached.summary_mean_std(), device)
    return Rotated.of(how, Moments.of(cached.summaries(_sample(rows, _SAMPLED_SUMMARIES, seed))), device)


def sampled_summaries(cache: Cache, teacher: str, rows: NDArray[np.int64], seed: int) -> Float[Tensor, "n c"]:
    """A seeded sample of a teacher's summaries, for statistics."""
    return torch.from_numpy(cache.teachers[teacher].summaries(_sample(rows, _SAMPLED_SUMMARIES, seed)))


def from_coordinates(
    decoder: MapDecoder, normaliser: Rotated, channels: int, device: torch.device
) -> tuple[Float[Tensor, "c c"], Float[Tensor, " c"]]:
    """Decoding's last step and the normalisation as one: targets are `coordinates @ weight + bias`. Made in float64.

    A klt cache would else be rotated twice.
    """
    origin = decoder.features(torch.zeros(channels, device=device)).double()
    rotation = decoder.features(torch.eye(channels, device=device)).double() - origin
    turned = normaliser.matrix.double().T
    return (rotation @ turned).float(), ((origin - normaliser.shift.double()) @ turned).float()


def _sample(rows: NDArray[np.int64], limit: int, seed: int) -> NDArray[np.int64]:
    """At most `limit` of the rows, the same for the same seed, sorted."""
    if len(rows) <= limit:
        return rows
    return np.sort(np.random.default_rng((seed, len(rows))).choice(rows, limit, replace=False))
