"""What teachers' features are brought to before they are targets, by name, and how to undo it in a trained head.

"none" leaves them; "standardise" uses the mean and deviation per channel that the cache recorded while it was built; the
others (`radio_cache.statistics.phi_s`) need a covariance, which is taken of a seeded sample of maps from all over the cache
(docs/design/009-target-statistics.md).
"""

import contextlib
import math
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController
from torch import Tensor

from radio_cache.codecs import is_tokenwise
from radio_cache.codecs.base import ChannelTransform
from radio_cache.errors import HadamardError, MomentsError
from radio_cache.geometry.crops import valid_tokens
from radio_cache.reader import Cache, CachedTeacher
from radio_cache.statistics.moments import Moments, cross_validated, merge_all
from radio_cache.statistics.phi_s import NORMALISATIONS
from radio_cache.torch import MapDecoder
from trainer.model.adaptors import Head, fold_into_last
from trainer.recipes.recipe import Normalise

_TOKENS_PER_CHANNEL = 128
"""Tokens that a covariance of c channels is taken of are at least so many times c, where there are as many."""

_FEWEST_TOKENS, _FEWEST_IMAGES = 65_536, 4096
"""Tokens of one image resemble each other: a covariance gains more from further images than from further tokens."""

_MOST_BYTES = 2 << 30
"""Stored bytes that are read for a sample, unless it takes more for enough tokens: SAM's maps have 2 MB in half precision."""

_SAMPLED_SUMMARIES, _AT_ONCE = 16_384, 4096
_PARTS = 8
"""Parts that a sample is cut into, image by image, to be held against each other."""

_BATCH_VALUES = 1 << 25
"""Decoded values in memory at once, beside their copy in float64."""

_READ_THREADS = 4

_KEPT_VARIANCE = 1e-6
"""Of the mean variance; a direction with less was not kept by the codec."""

_TOKENS = 5
"""A stream of random numbers drawn from the recipe's seed."""


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
    with telling_whose(f"{cache.url}, teacher '{teacher}', normalise={how}"), one_blas_thread():
        parts = _spatial_parts(cache, cached, rows, seed)
        mean, std = cached.spatial_mean_std()
        if cached.codec.channel_transform is not None:
            moments = _with_recorded_mean(_known(how, parts), mean)
        else:
            moments = _known(how, _rescaled(parts, mean, std))
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
    with telling_whose(f"{cache.url}, teacher '{teacher}', normalise_summary={how}"), one_blas_thread():
        most = max(_SAMPLED_SUMMARIES, _TOKENS_PER_CHANNEL * (cached.spec.summary_dim or 0))
        sampled = _sample(rows, most, seed)
        parts = [Moments.empty(cached.spec.summary_dim or 0)] * _PARTS
        for first in range(0, len(sampled), _AT_ONCE):
            vectors = cached.summaries(sampled[first : first + _AT_ONCE])
            parts = [part.merge(Moments.of(vectors[number::_PARTS])) for number, part in enumerate(parts)]
        return Rotated.of(how, _known(how, _rescaled(parts, *cached.summary_mean_std())), device)


@contextlib.contextmanager
def telling_whose(what: str) -> Generator[None]:
    """Put the teacher before a message about its moments or its width."""
    try:
        yield
    except (MomentsError, HadamardError) as exc:
        raise type(exc)(f"{what}: {exc}") from exc


def one_blas_thread() -> AbstractContextManager[object]:
    """How many threads BLAS takes changes the last bits of a covariance, and with them the signs and turns of its axes."""
    return ThreadpoolController().limit(limits=1, user_api="blas")


def _known(how: Normalise, parts: list[Moments]) -> Moments:
    """What a normalisation is fitted to. PHI-S and `global` divide by no single direction's variance."""
    filled = [part for part in parts if part.count]
    if len(filled) < 2 or how in ("phi-s", "global"):
        return merge_all(parts)
    return cross_validated(filled)


def _rescaled(parts: list[Moments], mean: NDArray[np.float64], std: NDArray[np.float64]) -> list[Moments]:
    """The parts with such factors on their channels that the whole has the recorded mean and deviations."""
    whole = merge_all(parts)
    own = np.sqrt(np.diag(whole.covariance))
    factors = np.where((own > 0) & (std > 0), std / np.where(own > 0, own, 1), 1.0)
    return [
        Moments(part.count, mean + (part.mean - whole.mean) * factors, part.scatter * np.outer(factors, factors))
        for part in parts
    ]


def _with_recorded_mean(moments: Moments, mean: NDArray[np.float64]) -> Moments:
    """Of decoded maps: with the mean that was recorded, but along directions that the codec does not keep.

    Along those, every decoded token is the codec's own mean, and a difference of means divided by a deviation of nearly
    nothing would become a target.
    """
    eigenvalues, axes = moments.principal_axes()
    kept = axes[:, eigenvalues > _KEPT_VARIANCE * eigenvalues.mean()]
    return Moments(moments.count, moments.mean + kept @ (kept.T @ (mean - moments.mean)), moments.scatter)


def _spatial_parts(cache: Cache, cached: CachedTeacher, rows: NDArray[np.int64], seed: int) -> list[Moments]:
    """Moments of a seeded sample of the maps' tokens that show an image, as they are decoded, in disjoint sets of images.

    Of a teacher with stored views an image's views take turns: the recorded statistics are over all of them.
    """
    spec, codec = cached.spec, cached.codec
    grid = math.prod(spec.geometry.grid_hw)
    row_bytes = math.prod(cached.row_shape) * codec.dtype.itemsize
    needed = max(1, 2 * _TOKENS_PER_CHANNEL * spec.spatial_dim // grid)  # twice: padding is no token
    sampled = _sample(rows, max(needed, min(_FEWEST_IMAGES, _MOST_BYTES // row_bytes)), seed)
    views = np.arange(len(sampled)) % spec.views
    shown = _tokens_shown(cache, cached, sampled, views)
    each = _tokens_of_each(
        [len(places) for places in shown], max(_TOKENS_PER_CHANNEL * spec.spatial_dim, _FEWEST_TOKENS)
    )
    rng = np.random.default_rng((seed, _TOKENS))
    chosen = [places if len(places) <= each else np.sort(rng.choice(places, each, replace=False)) for places in shown]
    decoder = MapDecoder(codec, torch.device("cpu"))
    parts = [Moments.empty(spec.spatial_dim)] * _PARTS
    together = max(1, _BATCH_VALUES // (each * spec.spatial_dim))
    for number in range(_PARTS):
        for view in range(spec.views):
            own = [place for place in range(number, len(sampled), _PARTS) if views[place] == view]
            for some in (own[first : first + together] for first in range(0, len(own), together)):
                tokens = _decoded_tokens(cached, decoder, sampled[some], view, [chosen[place] for place in some])
                parts[number] = parts[number].merge(Moments.of(tokens))
    if codec.channel_transform is None:
        return parts
    return [_of_features(part, codec.channel_transform) for part in parts]


def _tokens_shown(
    cache: Cache, cached: CachedTeacher, rows: NDArray[np.int64], views: NDArray[np.int64]
) -> list[NDArray[np.int64]]:
    """For each image, and the view of it, the numbers of the tokens that show it, row by row of the map."""
    sizes: list[tuple[int, int]] = [(0, 0)] * len(rows)
    for view in range(cached.spec.views):
        places = np.flatnonzero(views == view)
        for place, one in zip(places.tolist(), cached.views_of(rows[places], view=view), strict=True):
            sizes[place] = one.image_hw
    return [np.flatnonzero(valid_tokens(hw, cached.spec.geometry)) for hw in sizes]


def _tokens_of_each(counts: Sequence[int], wanted: int) -> int:
    """The fewest tokens to take of each image, at most all it has, so that there are as many as wanted."""
    most = max([1, *counts])
    having = np.array(counts)
    return next((each for each in range(1, most) if int(np.minimum(having, each).sum()) >= wanted), most)


def _decoded_tokens(
    cached: CachedTeacher, decoder: MapDecoder, rows: NDArray[np.int64], view: int, chosen: list[NDArray[np.int64]]
) -> NDArray[np.float32]:
    """Return the coordinates (n, c) of the chosen tokens of these images: features, or in the codec's channel transform."""
    tokens: list[NDArray[np.float32]] = []
    read = 0
    for some in cached.batches(rows.tolist()):
        codes = cached.codes(some, view=view, threads=_READ_THREADS)
        places = chosen[read : read + len(some)]
        read += len(some)
        if not is_tokenwise(cached.codec):
            maps = decoder.token_coordinates(torch.from_numpy(codes)).flatten(1, 2).numpy()
            tokens += [one[own] for one, own in zip(maps, places, strict=True)]
        else:
            kept = [one.reshape(-1, one.shape[-1])[own] for one, own in zip(codes, places, strict=True)]
            stored = torch.from_numpy(np.concatenate(kept))
            tokens.append(decoder.coordinates(stored[None, None])[0, 0].numpy())
    return np.concatenate(tokens) if tokens else np.zeros((0, cached.spec.spatial_dim), np.float32)


def _of_features(part: Moments, transform: ChannelTransform) -> Moments:
    """Turn moments of coordinates into those of the features that they stand for."""
    matrix = transform.matrix
    scatter = matrix @ part.scatter @ matrix.T
    return Moments(part.count, transform.mean.astype(np.float64) + matrix @ part.mean, (scatter + scatter.T) / 2)


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
