"""Normalisations of targets, by name, and their inverses, which are folded into trained heads.

"none" changes nothing. "standardise" uses the mean and deviation per channel that the build recorded. The
others (`radio_cache.statistics.phi_s`) need a covariance, estimated on a seeded sample of maps from the whole cache
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
"""A covariance of c channels is estimated on at least this many times c tokens, if the cache has them."""

_FEWEST_TOKENS, _FEWEST_IMAGES = 65_536, 4096
"""Least tokens and images of a sample. Tokens of one image are similar, so a covariance gains more from more images."""

_MOST_BYTES = 2 << 30
"""Most stored bytes read for a sample, unless enough tokens need more: SAM's maps take 2 MB in half precision."""

_SAMPLED_SUMMARIES, _AT_ONCE = 16_384, 4096
_PARTS = 8
"""Disjoint sets of images in a sample, for cross-validation."""

_BATCH_VALUES = 1 << 25
"""Decoded values in memory at once, in addition to their copy in float64."""

_READ_THREADS = 4

_KEPT_VARIANCE = 1e-6
"""Share of the mean variance below which a direction counts as dropped by the codec."""

_TOKENS = 5
"""Stream of the recipe's random numbers that draws tokens."""


@dataclass(frozen=True)
class PerChannel:
    """y = (x - mean) / std, channel by channel."""

    mean: Float[Tensor, " c"]
    std: Float[Tensor, " c"]

    def __call__(self, features: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        return (features - self.mean) / self.std

    def fold_into(self, head: Head) -> None:
        """Make a head that learnt these targets predict in the teacher's units."""
        fold_into_last(head, self.std, self.mean)

    @classmethod
    def of(cls, mean: NDArray[np.float64], std: NDArray[np.float64], device: torch.device) -> "PerChannel":
        # A constant channel carries no information. Dividing by its deviation would only amplify rounding.
        floor = max(1e-6, 1e-3 * float(np.median(std)))
        return cls(*(torch.from_numpy(a).to(device, torch.float32) for a in (mean, np.maximum(std, floor))))


@dataclass(frozen=True)
class Rotated:
    """y = matrix (x - shift), and its inverse."""

    shift: Float[Tensor, " c"]
    matrix: Float[Tensor, "c c"]
    inverse: Float[Tensor, "c c"]

    def __call__(self, features: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        # (..., c) @ (c, c): each row is a token, so the matrix applies from the right, transposed
        return (features - self.shift) @ self.matrix.T

    def fold_into(self, head: Head) -> None:
        """Make a head that learnt these targets predict in the teacher's units: W <- M^-1 W, b <- M^-1 b + shift."""
        fold_into_last(head, self.inverse, self.shift)

    @classmethod
    def of(cls, name: str, moments: Moments, device: torch.device) -> "Rotated":
        """Fit the named normalisation to moments.

        Raises:
            MomentsError: for features that do not vary.
            HadamardError: for widths without a Hadamard matrix.
        """
        affine = NORMALISATIONS[name](moments)
        # The inverse is fitted with the matrix, in float64. Inverting the float32 matrix would lose digits where directions
        # differ much in variance.
        parts = (affine.shift, affine.matrix, affine.inverse_matrix)
        return cls(*(torch.from_numpy(np.ascontiguousarray(a)).to(device, torch.float32) for a in parts))


Normaliser = PerChannel | Rotated


def spatial_normaliser(
    cache: Cache, teacher: str, how: Normalise, rows: NDArray[np.int64], seed: int, device: torch.device
) -> Normaliser | None:
    """Fit the normaliser of a teacher's maps.

    Args:
        cache: of the teacher.
        teacher: name of the teacher or of one of its levels.
        how: name of the normalisation.
        rows: images to sample from, if the normalisation needs a covariance.
        seed: of the sample.
        device: of the result.
    """
    cached = cache.teachers[teacher]
    if how == "none":
        return None
    if how == "standardise":
        return PerChannel.of(*cached.spatial_mean_std(), device)
    with naming_the_teacher(f"{cache.url}, teacher '{teacher}', normalise={how}"), one_blas_thread():
        # BLAS is held to one thread here, see `one_blas_thread`.
        parts = _spatial_parts(cache, cached, rows, seed)
        mean, std = cached.spatial_mean_std()
        # klt has a channel transform. Only the mean comes from the records, and not along directions that the codec drops:
        # docs/design/009-target-statistics.md.
        if cached.codec.channel_transform is not None:
            moments = _with_recorded_mean(_known(how, parts), mean)
        else:
            moments = _known(how, _rescaled(parts, mean, std))
        return Rotated.of(how, moments, device)


def summary_normaliser(
    cache: Cache, teacher: str, how: Normalise, rows: NDArray[np.int64], seed: int, device: torch.device
) -> Normaliser | None:
    """Fit the normaliser of a teacher's summaries, with the arguments of `spatial_normaliser`."""
    cached = cache.teachers[teacher]
    if how == "none":
        return None
    if how == "standardise":
        return PerChannel.of(*cached.summary_mean_std(), device)
    with naming_the_teacher(f"{cache.url}, teacher '{teacher}', normalise_summary={how}"), one_blas_thread():
        limit = max(_SAMPLED_SUMMARIES, _TOKENS_PER_CHANNEL * (cached.spec.summary_dim or 0))
        sampled = _sample(rows, limit, seed)
        parts = [Moments.empty(cached.spec.summary_dim or 0)] * _PARTS
        for first in range(0, len(sampled), _AT_ONCE):
            vectors = cached.summaries(sampled[first : first + _AT_ONCE])
            # Interleaved: every part is spread over the whole cache.
            parts = [part.merge(Moments.of(vectors[number::_PARTS])) for number, part in enumerate(parts)]
        return Rotated.of(how, _known(how, _rescaled(parts, *cached.summary_mean_std())), device)


@contextlib.contextmanager
def naming_the_teacher(what: str) -> Generator[None]:
    """Prefix messages about moments or widths with `what`, which names the teacher."""
    try:
        yield
    except (MomentsError, HadamardError) as exc:
        raise type(exc)(f"{what}: {exc}") from exc


def one_blas_thread() -> AbstractContextManager[object]:
    """Limit BLAS to one thread: their number changes the last bits of a covariance, and so the signs and order of its axes."""
    return ThreadpoolController().limit(limits=1, user_api="blas")


def _known(how: Normalise, parts: list[Moments]) -> Moments:
    """Return the moments that a normalisation is fitted to, cross-validated if it divides by variances of single directions."""
    filled = [part for part in parts if part.count]
    # phi-s and global divide by one scale for all channels, the mean variance, which a sample measures without bias.
    if len(filled) < 2 or how in ("phi-s", "global"):
        return merge_all(parts)
    return cross_validated(filled)


def _rescaled(parts: list[Moments], mean: NDArray[np.float64], std: NDArray[np.float64]) -> list[Moments]:
    """Scale the channels of the parts so that the whole has the recorded mean and deviations."""
    whole = merge_all(parts)
    # Channels that do not vary, in the sample or in the records, are left as they are.
    sample_std = np.sqrt(np.diag(whole.covariance))
    factors = np.where((sample_std > 0) & (std > 0), std / np.where(sample_std > 0, sample_std, 1), 1.0)
    return [
        Moments(part.count, mean + (part.mean - whole.mean) * factors, part.scatter * np.outer(factors, factors))
        for part in parts
    ]


def _with_recorded_mean(moments: Moments, mean: NDArray[np.float64]) -> Moments:
    """Replace the mean of decoded maps by the recorded one, except along directions that the codec drops.

    Along those every decoded token equals the codec's mean. A difference of means divided by a deviation near
    zero would become a large target.
    """
    # (c,) eigenvalues and (c, c) axes, one per column
    eigenvalues, axes = moments.principal_axes()
    coded = axes[:, eigenvalues > _KEPT_VARIANCE * eigenvalues.mean()]
    # coded @ coded.T projects the correction (c,) onto the directions that the codec keeps.
    return Moments(moments.count, moments.mean + coded @ (coded.T @ (mean - moments.mean)), moments.scatter)


def _spatial_parts(cache: Cache, cached: CachedTeacher, rows: NDArray[np.int64], seed: int) -> list[Moments]:
    """Return the moments of decoded tokens of a seeded sample, in `_PARTS` disjoint sets of images. Padding is left out.

    For a teacher with stored views, images alternate between the views, since the recorded statistics cover all of them.
    """
    spec, codec = cached.spec, cached.codec
    grid = math.prod(spec.geometry.grid_hw)
    row_bytes = math.prod(cached.row_shape) * codec.dtype.itemsize
    needed = max(1, 2 * _TOKENS_PER_CHANNEL * spec.spatial_dim // grid)  # twice as many, because padding does not count
    sampled = _sample(rows, max(needed, min(_FEWEST_IMAGES, _MOST_BYTES // row_bytes)), seed)
    # (n,) view of each sampled image
    views = np.arange(len(sampled)) % spec.views
    valid = _valid_tokens(cache, cached, sampled, views)
    tokens_per_image = _tokens_per_image(
        [len(tokens) for tokens in valid], max(_TOKENS_PER_CHANNEL * spec.spatial_dim, _FEWEST_TOKENS)
    )
    rng = np.random.default_rng((seed, _TOKENS))
    chosen = [
        tokens if len(tokens) <= tokens_per_image else np.sort(rng.choice(tokens, tokens_per_image, replace=False))
        for tokens in valid
    ]
    # On the CPU: moments are summed in NumPy, and do not vary with the run's device.
    decoder = MapDecoder(codec, torch.device("cpu"))
    parts = [Moments.empty(spec.spatial_dim)] * _PARTS
    images_per_batch = max(1, _BATCH_VALUES // (tokens_per_image * spec.spatial_dim))
    for number in range(_PARTS):
        for view in range(spec.views):
            images = [index for index in range(number, len(sampled), _PARTS) if views[index] == view]
            for batch in (
                images[first : first + images_per_batch] for first in range(0, len(images), images_per_batch)
            ):
                tokens = _decoded_tokens(cached, decoder, sampled[batch], view, [chosen[index] for index in batch])
                parts[number] = parts[number].merge(Moments.of(tokens))
    if codec.channel_transform is None:
        return parts
    return [_of_features(part, codec.channel_transform) for part in parts]


def _valid_tokens(
    cache: Cache, cached: CachedTeacher, rows: NDArray[np.int64], views: NDArray[np.int64]
) -> list[NDArray[np.int64]]:
    """Return, for each image and its view, the row-major indices of the tokens that are not padding."""
    sizes: list[tuple[int, int]] = [(0, 0)] * len(rows)
    for view in range(cached.spec.views):
        indices = np.flatnonzero(views == view)
        for index, image_view in zip(indices.tolist(), cached.views_of(rows[indices], view=view), strict=True):
            sizes[index] = image_view.image_hw
    return [np.flatnonzero(valid_tokens(hw, cached.spec.geometry)) for hw in sizes]


def _tokens_per_image(counts: Sequence[int], total: int) -> int:
    """Return the fewest tokens per image that give `total` tokens, or all tokens if there are fewer."""
    # Images with fewer tokens give all of theirs, so the others must give more than an even share.
    largest = max([1, *counts])
    available = np.array(counts)
    return next((each for each in range(1, largest) if int(np.minimum(available, each).sum()) >= total), largest)


def _decoded_tokens(
    cached: CachedTeacher, decoder: MapDecoder, rows: NDArray[np.int64], view: int, chosen: list[NDArray[np.int64]]
) -> NDArray[np.float32]:
    """Return the coordinates (n, c) of the chosen tokens of these images: features, or in the codec's channel transform."""
    tokens: list[NDArray[np.float32]] = []
    read = 0
    for batch in cached.batches(rows.tolist()):
        codes = cached.codes(batch, view=view, threads=_READ_THREADS)
        indices = chosen[read : read + len(batch)]
        read += len(batch)
        if not is_tokenwise(cached.codec):
            # A codec of whole maps decodes all tokens at once: (b, ...) codes -> (b, h, w, c) -> (b, h * w, c)
            maps = decoder.token_coordinates(torch.from_numpy(codes)).flatten(1, 2).numpy()
            tokens += [image_map[of_image] for image_map, of_image in zip(maps, indices, strict=True)]
        else:
            # Only the codes of the chosen tokens are decoded.
            picked = [row.reshape(-1, row.shape[-1])[of_image] for row, of_image in zip(codes, indices, strict=True)]
            # (n, width of a code) -> (1, 1, n, width of a code), a map of one row, as the decoder takes maps
            stored = torch.from_numpy(np.concatenate(picked))
            tokens.append(decoder.coordinates(stored[None, None])[0, 0].numpy())
    return np.concatenate(tokens) if tokens else np.zeros((0, cached.spec.spatial_dim), np.float32)


def _of_features(part: Moments, transform: ChannelTransform) -> Moments:
    """Turn moments of coordinates into those of the features that they stand for."""
    matrix = transform.matrix
    # Cov(M x) = M Cov(x) M^T, made symmetric again after rounding. (c, c)
    scatter = matrix @ part.scatter @ matrix.T
    return Moments(part.count, transform.mean.astype(np.float64) + matrix @ part.mean, (scatter + scatter.T) / 2)


def sampled_summaries(cache: Cache, teacher: str, rows: NDArray[np.int64], seed: int) -> Float[Tensor, "n c"]:
    """Return a seeded sample of a teacher's summaries, for statistics."""
    return torch.from_numpy(cache.teachers[teacher].summaries(_sample(rows, _SAMPLED_SUMMARIES, seed)))


def from_coordinates(
    decoder: MapDecoder, normaliser: Rotated, channels: int, device: torch.device
) -> tuple[Float[Tensor, "c c"], Float[Tensor, " c"]]:
    """Compose decoding's last step and the normalisation: targets are `coordinates @ weight + bias`.

    Otherwise the targets of a klt cache would be rotated twice. Computed in float64.

    Returns:
        (c, c) weight and (c,) bias, in float32.
    """
    # Decoding is affine, so its matrix is what it makes of the unit vectors, less what it makes of zero.
    # (c, c) @ (c, c) -> (c, c), and (c,) @ (c, c) -> (c,)
    origin = decoder.features(torch.zeros(channels, device=device)).double()
    rotation = decoder.features(torch.eye(channels, device=device)).double() - origin
    turned = normaliser.matrix.double().T
    return (rotation @ turned).float(), ((origin - normaliser.shift.double()) @ turned).float()


def _sample(rows: NDArray[np.int64], limit: int, seed: int) -> NDArray[np.int64]:
    """Return at most `limit` of the rows, sorted. The same seed gives the same rows."""
    if len(rows) <= limit:
        return rows
    return np.sort(np.random.default_rng((seed, len(rows))).choice(rows, limit, replace=False))
