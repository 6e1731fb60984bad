"""Choice of a new teacher's codec, calibrated on a seeded random sample of the images before its first shard.

The sample, the order of the sums and everything after them are fixed. A build that is killed here and started again therefore
comes to the same codec, and every later run uses the codec that is recorded first.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from radio_cache.codecs import Codec
from radio_cache.codecs.base import COVARIANCE, CalibrationMaps
from radio_cache.codecs.calibrate import CodecRequest, calibrate
from radio_cache.codecs.limits import LARGEST_FEATURE, not_finite
from radio_cache.errors import CodecError, UnstorableFeaturesError
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.schema import TeacherSpec
from radio_cache.statistics.moments import Moments

_SEED = 0
_TOKENS_PER_CHANNEL = 16
"""Calibration tokens per channel: a covariance of c channels needs some multiple of c tokens."""

_MIN_TOKENS_PER_CHANNEL = 6
_MIN_IMAGES = 64
_MAX_IMAGES = 512
_HELD_OUT_SHARE = 0.2
_SAMPLED_MAP_TOKENS = 65_536
"""Tokens of whole maps, for codecs that transform rows and columns; a fifth more for the held-out ones."""

_SAMPLED_TOKENS = 32_768
"""Tokens kept in memory to choose widths and steps with. The moments include all tokens."""


@dataclass(frozen=True)
class ChosenCodec:
    """A codec, its record in the teacher's spec, and a sentence for the user, which may be empty."""

    codec: Codec
    recorded: CodecRecord
    note: str


def resolve_codec_request(spec: TeacherSpec, num_images: int) -> tuple[CodecRequest, str]:
    """Return the request to follow for a teacher that is not in the cache yet, and a note for the user.

    Without a request it is klt, packed, at fidelity 0.99, or half if there are too few images to calibrate on.

    Args:
        spec: the teacher's spec, with the codec that was requested, if any.
        num_images: usable images of the sample.

    Raises:
        CodecError: a codec that needs more images was requested.
    """
    min_images = min_calibration_images(spec)
    request = _request(spec)
    # Only a covariance needs many tokens; ranges of channels are known from a few.
    if request.codec_class.needs not in COVARIANCE or num_images >= min_images:
        return request, ""
    if spec.codec.request is None:
        note = f"{too_few_images(num_images)} to calibrate the codec klt (it wants {min_images}): keeping float16"
        return CodecRequest(name="half"), note
    raise CodecError(
        f"{too_few_images(num_images)} to calibrate {request.name} for {spec.spatial_dim} channels: take at least "
        f"{min_images}, or --codec int8 or half"
    )


def too_few_images(count: int) -> str:
    """Return the beginning of a sentence about too few images."""
    return "1 image is too few" if count == 1 else f"{count} images are too few"


def num_images_wanted(spec: TeacherSpec) -> int:
    """Return the number of usable images that a teacher's codec is chosen by, 0 if it needs none."""
    return sample_size(spec) if _request(spec).needs_calibration else 0


def _request(spec: TeacherSpec) -> CodecRequest:
    return spec.codec.requested() or CodecRequest()


def min_calibration_images(spec: TeacherSpec) -> int:
    """Return the number of usable images below which a build does not calibrate a codec."""
    return max(_MIN_IMAGES, _images_for(spec, _MIN_TOKENS_PER_CHANNEL))


def sample_size(spec: TeacherSpec) -> int:
    """Return the number of images that a teacher's codec is calibrated on, if there are as many."""
    min_images = min_calibration_images(spec)
    return min(max(min_images, _images_for(spec, _TOKENS_PER_CHANNEL)), max(_MAX_IMAGES, min_images))


def enough_tokens(spec: TeacherSpec, images: int) -> bool:
    """Return whether a covariance over this number of images is reliable."""
    return images >= max(2, _images_for(spec, _MIN_TOKENS_PER_CHANNEL))


def _images_for(spec: TeacherSpec, tokens_per_channel: int) -> int:
    # Ceiling division: a part of an image is no image.
    return -(-tokens_per_channel * spec.spatial_dim // int(np.prod(spec.geometry.grid_hw)))


def sample_rows(rows: NDArray[np.int64], count: int, name: str) -> list[int]:
    """Return a seeded sample of `count` of these rows, in random order, which differs from teacher to teacher."""
    # By the name, so that two teachers do not share their unlucky images.
    rng = np.random.default_rng((_SEED, zlib.crc32(name.encode())))
    return [int(row) for row in rng.permutation(rows)[:count]]


def codec_without_calibration(request: CodecRequest, note: str = "") -> ChosenCodec:
    """Return the codec of a request that needs no sample."""
    no_tokens = np.zeros((0, 1), np.float32)
    codec = calibrate(request, Moments.of(no_tokens), no_tokens, no_tokens).codec
    return ChosenCodec(codec, CodecRecord(parameters=codec.to_json()), note)


class SampledMaps:
    """The first maps of a sample, as many as memory allows."""

    def __init__(self) -> None:
        self._fitted: list[NDArray[np.float32]] = []
        self._held_out: list[tuple[NDArray[np.float32], NDArray[np.bool_]]] = []

    def add(self, features: NDArray[np.float32], valid: NDArray[np.bool_], *, held_out: bool) -> None:
        """Keep a map (h, w, c), unless there are enough."""
        # At least one of each, however large the maps are.
        if held_out and len(self._held_out) <= _HELD_OUT_SHARE * _SAMPLED_MAP_TOKENS // valid.size:
            self._held_out.append((features, valid))
        if not held_out and len(self._fitted) <= _SAMPLED_MAP_TOKENS // valid.size:
            self._fitted.append(features)

    def sample(self) -> CalibrationMaps:
        """Return the kept maps. A sample of one image is fitted to its own map."""
        held_out, valid = (np.stack(part) for part in zip(*self._held_out, strict=True))
        return CalibrationMaps(
            fitted=np.stack(self._fitted) if self._fitted else held_out, held_out=held_out, valid=valid
        )


@final
class Calibration:
    """A codec in the making: add the tokens of each image of the sample in order, then call `finish`.

    The codec is calibrated on the later four fifths of the images, and its fidelity is measured on the first fifth.

    Args:
        request: the codec that is wanted.
        rows: rows of the sample, in the order in which their tokens are added.
    """

    def __init__(self, request: CodecRequest, rows: Sequence[int]) -> None:
        self._request, self._rows = request, rows
        # At least one image, or there would be no fidelity to measure.
        self._num_held_out = max(1, round(_HELD_OUT_SHARE * len(rows)))
        # The same number of each image, so that no image dominates.
        self._tokens_per_image = max(1, _SAMPLED_TOKENS // len(rows))
        self._moments: Moments | None = None
        self._sampled_tokens: list[NDArray[np.float32]] = []
        self._maps = SampledMaps() if request.codec_class.needs == "maps" else None
        # The number of threads of BLAS changes the last bits of a covariance and its eigenvectors, and with them every code.
        self._libraries = ThreadpoolController()

    def add(self, features: NDArray[np.float32], valid: NDArray[np.bool_]) -> None:
        """Add the map (h, w, c) of the next image. valid: (h, w) tokens that show the image.

        Raises:
            UnstorableFeaturesError: a feature is not finite, or too large.
        """
        number = len(self._sampled_tokens)
        tokens = features[valid]  # (h, w, c) -> (n, c)
        magnitude = float(np.abs(tokens).max(initial=0))
        if not magnitude <= LARGEST_FEATURE:  # true for NaN, too
            raise UnstorableFeaturesError(self._rows[number], str(not_finite(magnitude)))
        # Held-out images must not influence the basis that they judge.
        if number >= self._num_held_out:
            with self._libraries.limit(limits=1, user_api="blas"):
                image_moments = Moments.of(tokens)
            self._moments = image_moments if self._moments is None else self._moments.merge(image_moments)
        if len(tokens) > self._tokens_per_image:
            # Seeded by the position: the sample is the same however the images come.
            rng = np.random.default_rng((_SEED, number))
            tokens = tokens[rng.permutation(len(tokens))[: self._tokens_per_image]]
        self._sampled_tokens.append(tokens)
        if self._maps is not None:
            self._maps.add(features, valid, held_out=number < self._num_held_out)

    def finish(self) -> ChosenCodec:
        """Return the calibrated codec. Raise CodecError if there are too few images or the fidelity is out of reach."""
        num_images, num_held_out = len(self._rows), self._num_held_out
        if self._moments is None:
            raise CodecError(
                f"{num_images} image is too few to calibrate the codec {self._request.name}: take --codec half"
            )
        held_out = np.concatenate(self._sampled_tokens[:num_held_out])
        calibrated_on = np.concatenate(self._sampled_tokens[num_held_out:])
        with self._libraries.limit(limits=1, user_api="blas"):
            maps = None if self._maps is None else self._maps.sample()
            calibrated = calibrate(self._request, self._moments, calibrated_on, held_out, maps=maps)
        fidelity = calibrated.fidelity
        label = self._request.label.replace("/", ", ")
        note = (
            f"codec {label}: mean cosine {fidelity.cosine:.4f} (worst percentile {fidelity.cosine_worst:.4f}) on "
            f"{num_held_out} held-out images, calibrated on {num_images - num_held_out}"
        )
        record = CodecRecord(
            parameters=calibrated.codec.to_json(),
            request=self._request.to_json(),
            calibration={
                "images": num_images,
                "tokens": self._moments.count,
                "seed": _SEED,
                **fidelity.to_json(),
            },
        )
        return ChosenCodec(calibrated.codec, record, note)


def calibrate_on_sample(
    request: CodecRequest, rows: Sequence[int], maps: Iterable[tuple[NDArray[np.float32], NDArray[np.bool_]]]
) -> ChosenCodec:
    """Return a codec calibrated on the map (h, w, c) and the valid tokens (h, w) of each row in order.

    Raises the errors of `Calibration`.
    """
    calibration = Calibration(request, rows)
    for features, valid in maps:
        calibration.add(features, valid)
    return calibration.finish()
