"""Before a teacher's first shard: its codec, calibrated on a seeded random sample of the images.

The sample, the order of the sums and everything after them are fixed, so a build that is killed here and started again
comes to the same codec; and whatever is written first is what every later run uses.
"""

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from radio_cache.codecs import Codec
from radio_cache.codecs.calibrate import CodecRequest, calibrate
from radio_cache.codecs.limits import LARGEST_FEATURE, not_finite
from radio_cache.errors import CodecError, UnstorableFeaturesError
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.schema import TeacherSpec
from radio_cache.statistics.moments import Moments

TokensOf = Callable[[list[int]], Iterable[NDArray[np.float32]]]
"""Rows -> for each row in order its tokens (n, c) that show the image."""

_SEED = 0
_TOKENS_PER_CHANNEL = 16
"""Calibration tokens per channel; a covariance of c channels needs some multiple of c tokens."""

_FEWEST_PER_CHANNEL = 6
_FEWEST_IMAGES = 64
_MOST_IMAGES = 512
_HELD_OUT = 0.2
_KEPT_TOKENS = 32_768
"""Tokens kept in memory for choosing widths and steps; the moments see all of them."""


@dataclass(frozen=True)
class ChosenCodec:
    """A codec, its record in the teacher's spec, and a sentence for the user."""

    codec: Codec
    recorded: CodecRecord
    note: str


def choose_codec(spec: TeacherSpec, sample: Sequence[int], tokens_of: TokensOf) -> ChosenCodec:
    """The codec for a teacher that is not in the cache yet.

    sample: the first `images_wanted` usable rows of `sample_rows`; all of them, where there are fewer.
    Without a request it is klt, packed, at fidelity 0.99; or half, where there are too few images to calibrate on.
    Raises CodecError if klt was asked for and there are too few images, or the fidelity is out of reach.
    """
    fewest = fewest_images(spec)
    request = _request(spec)
    if request.codec_class.needs == "covariance" and len(sample) < fewest:
        if spec.codec.request is None:
            half = CodecRequest(name="half")
            note = f"{too_few_images(len(sample))} to calibrate the codec klt (it wants {fewest}): keeping float16"
            return ChosenCodec(*_without_sample(half), note)
        raise CodecError(
            f"{too_few_images(len(sample))} to calibrate {request.name} for {spec.spatial_dim} channels: take at least "
            f"{fewest}, or --codec int8 or half"
        )
    if not request.needs_calibration:
        return ChosenCodec(*_without_sample(request), "")
    return calibrate_on_sample(request, list(sample), tokens_of)


def too_few_images(count: int) -> str:
    """The beginning of a sentence about images."""
    return "1 image is too few" if count == 1 else f"{count} images are too few"


def images_wanted(spec: TeacherSpec) -> int:
    """How many usable images a codec is chosen by: 0 if it needs none."""
    return sample_size(spec) if _request(spec).needs_calibration else 0


def _request(spec: TeacherSpec) -> CodecRequest:
    return spec.codec.requested() or CodecRequest()


def fewest_images(spec: TeacherSpec) -> int:
    """How many usable images a build wants before it calibrates a codec."""
    return max(_FEWEST_IMAGES, _images_for(spec, _FEWEST_PER_CHANNEL))


def sample_size(spec: TeacherSpec) -> int:
    """How many images a teacher's codec is calibrated on, where there are as many."""
    fewest = fewest_images(spec)
    return min(max(fewest, _images_for(spec, _TOKENS_PER_CHANNEL)), max(_MOST_IMAGES, fewest))


def enough_tokens(spec: TeacherSpec, images: int) -> bool:
    """Return whether so many images give a covariance that is worth its name."""
    return images >= max(2, _images_for(spec, _FEWEST_PER_CHANNEL))


def _images_for(spec: TeacherSpec, tokens_per_channel: int) -> int:
    return -(-tokens_per_channel * spec.spatial_dim // int(np.prod(spec.geometry.grid_hw)))


def sample_rows(rows: NDArray[np.int64], count: int, name: str) -> list[int]:
    """A seeded sample of `count` of these rows, in random order; another one for every teacher."""
    rng = np.random.default_rng((_SEED, zlib.crc32(name.encode())))
    return [int(row) for row in rng.permutation(rows)[:count]]


def _without_sample(request: CodecRequest) -> tuple[Codec, CodecRecord]:
    nothing = np.zeros((0, 1), np.float32)
    codec = calibrate(request, Moments.of(nothing), nothing, nothing).codec
    return codec, CodecRecord(parameters=codec.to_json())


def calibrate_on_sample(request: CodecRequest, rows: list[int], tokens_of: TokensOf) -> ChosenCodec:
    """A codec calibrated on the later four fifths of these images, and measured on the first fifth. Raises CodecError,
    UnstorableFeaturesError for an image whose features are not finite."""
    # How many threads BLAS takes changes the last bits of a covariance and its eigenvectors, and with them every code.
    libraries = ThreadpoolController()
    held_out_images = max(1, round(_HELD_OUT * len(rows)))
    kept_of_each = max(1, _KEPT_TOKENS // len(rows))
    moments: Moments | None = None
    kept: list[NDArray[np.float32]] = []
    for number, tokens in enumerate(tokens_of(rows)):
        magnitude = float(np.abs(tokens).max(initial=0))
        if not magnitude <= LARGEST_FEATURE:
            raise UnstorableFeaturesError(rows[number], str(not_finite(magnitude)))
        if number >= held_out_images:
            with libraries.limit(limits=1, user_api="blas"):
                own = Moments.of(tokens)
            moments = own if moments is None else moments.merge(own)
        rng = np.random.default_rng((_SEED, number))
        kept.append(tokens if len(tokens) <= kept_of_each else tokens[rng.permutation(len(tokens))[:kept_of_each]])
    if moments is None:
        raise CodecError(f"{len(rows)} image is too few to calibrate the codec {request.name}: take --codec half")
    held_out, seen = np.concatenate(kept[:held_out_images]), np.concatenate(kept[held_out_images:])
    with libraries.limit(limits=1, user_api="blas"):
        found = calibrate(request, moments, seen, held_out)
    record = {"images": len(rows), "tokens": moments.count, "seed": _SEED, **found.fidelity.to_json()}
    label = request.label.replace("/", ", ")
    note = (
        f"codec {label}: mean cosine {found.fidelity.cosine:.4f} (worst percentile {found.fidelity.cosine_worst:.4f}) on "
        f"{held_out_images} held-out images, calibrated on {len(rows) - held_out_images}"
    )
    codec_record = CodecRecord(parameters=found.codec.to_json(), request=request.to_json(), calibration=record)
    return ChosenCodec(found.codec, codec_record, note)
