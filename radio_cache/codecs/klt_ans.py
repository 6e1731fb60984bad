"""Entropy-coded klt of smooth maps: a DCT over rows and columns after the rotation of channels, and rANS. The smallest."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from radio_cache.codecs.base import Calibrated, CalibrationMaps, CalibrationSample, CalibrationTarget, Needs
from radio_cache.codecs.klt_basis import KltBasis
from radio_cache.codecs.klt_calibration import refuse_if_below
from radio_cache.codecs.limits import not_finite
from radio_cache.codecs.rans import (
    ESCAPE,
    LARGEST_VALUE,
    MAX_LANES,
    SLOTS,
    SYMBOLS,
    RansCoder,
    RansError,
    frequencies_of,
)
from radio_cache.errors import CodecError, CorruptShardError, StoreError
from radio_cache.statistics.fidelity import Fidelity, measure_fidelity

GAINS_PER_OCTAVE = 4
SMALLEST_GAIN, LARGEST_GAIN = -127, 127

SHORTEST_TOKEN = 16.0
"""A token counts as at least 1 / 16 as long as its distance from the mean."""

SCALES_PER_OCTAVE = 8
SCALES_PER_CLASS = 4
"""Scales are eighths of an octave, and coefficients within half an octave share a table."""

MAX_CLASSES = 64

_SMALLEST_MAGNITUDE = 0.02
"""Expected |q| of scale 0. Coefficients with less share the first table: it spends next to nothing on them."""

_TRADE = 0.06
"""Squared steps that a bit is worth: the dead zone that minimises distortion + _TRADE * bits."""

_PRIOR_SYMBOLS = 32.0
"""Weight of a Laplace distribution in a table, in symbols of the calibration."""

_SMALLEST_STEP, _LARGEST_STEP = 1e-3, 8.0
_SEARCH_ROUNDS = 14
_LANES = 4


@dataclass(frozen=True, eq=False)
class KltAns:
    """Store q = round(Z / step) for the DCT coefficients Z of a map's normalised coordinates, entropy coded by rANS.

    A token's coordinates y of `KltBasis` are divided by its gain a = 2^(g / 4), g = round(4 log2(rms of the whole token, mean
    included)), because a cosine does not depend on lengths. Each channel's map (h, w) of y / a is transformed by the orthonormal
    DCT-II along both axes. Neighbouring tokens are similar, so most coefficients are small. Rounding has a dead zone.

    A coefficient's expected magnitude is a product of its channel's and its frequency's (measured per coefficient it would
    overfit a sample of a few hundred images). Coefficients of similar magnitude share a table of frequencies. A row holds the
    differences of successive gains and then the coefficients by class, as `radio_cache.codecs.rans` codes them.
    Bound: a coefficient is off by at most step * max(thresholds of its class), and nothing saturates: in a map with a
    coefficient beyond 32,766 steps all gains rise. Rate table and rejected variants: docs/design/012-spatial-transform.md.

    Args:
        basis: rotation of the channels.
        step: of the coefficients, relative to the gain.
        shrink: (2,) distance of |Z| / step from |q|, for |q| = 1 and beyond: the mean of what rounds to q is nearer to 0.
        channel_scales: (c,) int16, expected magnitudes in eighths of an octave.
        frequency_scales: (h, w) int16, the same. Row 0, column 0 is the mean of a map.
        frequencies: (classes + 1, 256) uint16 of `RansCoder`, the last of gains.
        thresholds: (classes, 2) float32: |Z| / step from which on q is 1, and from which on it is q + 1, less q.
        lanes: of `RansCoder`.
        level: of zstd, which removes the zeros at the end of rows.
    """

    needs: ClassVar[Needs] = "maps"
    reaches_fidelity: ClassVar[bool] = True

    basis: KltBasis
    step: float
    shrink: tuple[float, float]
    channel_scales: NDArray[np.int16]
    frequency_scales: NDArray[np.int16]
    frequencies: NDArray[np.uint16]
    thresholds: NDArray[np.float32]
    lanes: int = _LANES
    level: int = 1

    @property
    def name(self) -> str:
        """Name on the command line: "klt"."""
        return "klt"

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8: bytes of an entropy code."""
        return np.dtype("uint8")

    @property
    def fill_value(self) -> float:
        """255: rows end with zeros."""
        return 255

    @property
    def zstd_level(self) -> int | None:
        """Level of zstd that shards are compressed with."""
        return self.level

    @property
    def row_axes(self) -> tuple[str, ...]:
        """One axis of bytes."""
        return ("code",)

    @property
    def channel_transform(self) -> KltBasis:
        """The rotation back to features."""
        return self.basis

    @property
    def transcodable(self) -> "KltAns":
        """The codec itself: its token coordinates are those of the other packings."""
        return self

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Height and width of the maps."""
        h, w = self.frequency_scales.shape
        return h, w

    @cached_property
    def classes(self) -> NDArray[np.int64]:
        """(h, w, c) number of each coefficient's table."""
        return classes_of(self.channel_scales, self.frequency_scales, len(self.thresholds))

    @cached_property
    def coder(self) -> RansCoder:
        """The entropy coder of rows: h * w differences of gains, then h * w * c coefficients."""
        flat = self.classes.ravel()
        num_gains = self.frequency_scales.size
        # Gains first, then class after class, so that a decoder uses one table at a time.
        order = np.concatenate([np.arange(num_gains), num_gains + np.argsort(flat, kind="stable")])
        counts = np.bincount(flat, minlength=len(self.thresholds))
        runs = np.concatenate([[num_gains], counts]).astype(np.int32)
        tables = np.concatenate([self.frequencies[-1:], self.frequencies[:-1]])
        return RansCoder(runs, order.astype(np.int32), np.ascontiguousarray(tables), self.lanes)

    def row_shape(self, grid_hw: tuple[int, int], channels: int) -> tuple[int, ...]:
        """Return the largest size of a row, (bytes,); the zeros at its end take no space under zstd."""
        del channels  # the basis has them
        if grid_hw != self.grid_hw:
            raise StoreError(f"codec klt, ans: calibrated for maps of {self.grid_hw}, not of {grid_hw}")
        return (self.coder.largest_row_bytes,)

    def encode(self, features: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Encode features (..., h, w, c) to codes (..., bytes).

        Raises:
            CodecError: for infinity, NaN, and values beyond 2^31.
        """
        return self.codes_of(self.basis.forward(features))

    def codes_of(self, coordinates: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Encode coordinates (..., h, w, c) to codes (..., bytes)."""
        return self.pack(*self.quantise(coordinates))

    def quantise(self, coordinates: NDArray[np.float32]) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
        """Quantise coordinates (..., h, w, c) to gains (..., h, w) and coefficients (..., h, w, c).

        Raises:
            CodecError: for infinity, NaN, and values beyond 2^31.
            StoreError: for maps of another grid.
        """
        if coordinates.shape[-3:-1] != self.grid_hw:
            raise StoreError(
                f"codec klt, ans: calibrated for maps of {self.grid_hw}, not of {coordinates.shape[-3:-1]}"
            )
        gains = gains_of(coordinates, self.basis.rotated_mean)
        coefficients = transform(coordinates / gain_values(gains)[..., None]) / np.float32(self.step)
        # A map whose energy is in one coefficient is coded more coarsely as a whole.
        excess = excess_gains(np.abs(coefficients).max(axis=(-3, -2, -1), initial=0))
        if not (gains + excess[..., None, None]).max(initial=0) <= LARGEST_GAIN:
            raise not_finite(float(np.abs(coordinates).max()) * self.basis.phi)
        gains = (gains + excess[..., None, None]).astype(np.int16)
        coefficients = coefficients / gain_values(excess)[..., None, None, None]
        return gains, round_coefficients(coefficients, self.thresholds[self.classes])

    def pack(self, gains: NDArray[np.int16], coefficients: NDArray[np.int16]) -> NDArray[np.uint8]:
        """Code gains (..., h, w) and coefficients (..., h, w, c) as rows (..., bytes)."""
        *images, h, w = gains.shape
        differences = np.diff(gains.reshape(*images, h * w), axis=-1, prepend=np.int16(0))
        values = np.concatenate(
            [differences, coefficients.reshape(*images, math.prod(coefficients.shape[-3:]))], axis=-1
        )
        size = self.coder.largest_row_bytes
        rows, _ = self.coder.encode(values.reshape(math.prod(images), values.shape[-1]), size)
        return rows.reshape(*images, size)

    def unpack(self, codes: NDArray[np.uint8]) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
        """Decode rows (..., bytes) to gains (..., h, w) and coefficients (..., h, w, c).

        Raises:
            CorruptShardError: for bytes that are not a code of this codec.
        """
        images, (h, w) = codes.shape[:-1], self.grid_hw
        try:
            values = self.coder.decode(codes.reshape(math.prod(images), codes.shape[-1]))
        except RansError as exc:
            raise CorruptShardError(
                f"a map is not a code of its codec ({exc}): radio-cache verify names the shard"
            ) from exc
        differences, coefficients = np.split(values, [h * w], axis=-1)
        # Clipped, so that whatever bytes decode to stays finite.
        gains = np.clip(np.cumsum(differences, axis=-1, dtype=np.int64), SMALLEST_GAIN, LARGEST_GAIN).astype(np.int16)
        return gains.reshape(*images, h, w), coefficients.reshape(*images, h, w, self.basis.channels)

    def decode(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Decode codes (..., bytes) to features (..., h, w, c)."""
        return self.basis.inverse(self.coordinates(codes))

    def coordinates(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Decode codes (..., bytes) to coordinates (..., h, w, c)."""
        return self.dequantise(*self.unpack(codes))

    def dequantise(self, gains: NDArray[np.int16], coefficients: NDArray[np.int16]) -> NDArray[np.float32]:
        """Return the coordinates (..., h, w, c) of gains (..., h, w) and coefficients (..., h, w, c)."""
        return inverse(expand(coefficients, self.shrink) * np.float32(self.step)) * gain_values(gains)[..., None]

    def to_json(self) -> dict[str, Any]:
        """Return the packing, the step, the shrinkage, the lanes and zstd's level."""
        return {
            "name": self.name,
            "packing": "ans",
            "step": self.step,
            "shrink": list(self.shrink),
            "lanes": self.lanes,
            "level": self.level,
        }

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the basis, the scales, the tables and the thresholds."""
        return {
            **self.basis.arrays(),
            "channel_scales": self.channel_scales,
            "frequency_scales": self.frequency_scales,
            "frequencies": self.frequencies,
            "thresholds": self.thresholds,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> "KltAns":
        """Build the codec from what `to_json` and `arrays` returned. Raise StoreError for impossible parameters."""
        basis = KltBasis.from_arrays(arrays)
        step, (first, further), lanes, level = float(data["step"]), data["shrink"], data["lanes"], data["level"]
        try:
            channel_scales, frequency_scales = arrays["channel_scales"], arrays["frequency_scales"]
            frequencies, thresholds = arrays["frequencies"], arrays["thresholds"]
        except KeyError as exc:
            raise StoreError(f"codec klt, ans: the array {exc} is missing") from exc
        shapes = (channel_scales.shape, frequency_scales.shape, frequencies.shape, thresholds.shape)
        fits = (
            channel_scales.shape == basis.mean.shape
            and frequency_scales.ndim == 2
            and frequency_scales.size > 0
            and thresholds.ndim == 2
            and thresholds.shape[1] == 2
            and 1 <= len(thresholds) <= MAX_CLASSES
            and frequencies.shape == (len(thresholds) + 1, SYMBOLS)
        )
        if not fits:
            raise StoreError(f"codec klt, ans: arrays of shapes {shapes} do not fit {basis.channels} channels")
        # A table that does not sum to its slots, or has no slot for escapes, would make the coder read beyond it.
        if (frequencies.astype(np.int64).sum(axis=1) != SLOTS).any() or frequencies[:, ESCAPE].min() < 1:
            raise StoreError(f"codec klt, ans: a table of frequencies does not sum to {SLOTS}, or has none for escapes")
        possible = 0 < step < math.inf and type(lanes) is int and 1 <= lanes <= MAX_LANES and type(level) is int
        shrink = (float(first), float(further))
        if not possible or not all(-1 < value < 1 for value in shrink):
            raise StoreError(
                f"codec klt, ans: step {step:g}, shrink {shrink}, {lanes!r:.20} lanes, level {level!r:.20} are impossible"
            )
        return cls(
            basis,
            step,
            shrink,
            channel_scales.astype(np.int16),
            frequency_scales.astype(np.int16),
            frequencies.astype(np.uint16),
            thresholds.astype(np.float32),
            lanes,
            level,
        )

    @classmethod
    def calibrate(cls, target: CalibrationTarget, sample: CalibrationSample) -> Calibrated:
        """Take the target's step, or the largest one that reaches its cosine on the held-out maps."""
        maps = sample.maps
        if maps is None:
            raise ValueError("klt, ans is calibrated on whole maps")
        fitted = _Fitted.of(sample, maps)
        step = target.step
        if step is None:
            # The cosine falls as the step grows: halve the range of log(step).
            low, high = np.log(_SMALLEST_STEP), np.log(_LARGEST_STEP)
            refuse_if_below(target, fitted.fidelity_of(fitted.codec(float(np.exp(low)))))
            for _ in range(_SEARCH_ROUNDS):
                middle = (low + high) / 2
                is_enough = fitted.fidelity_of(fitted.codec(float(np.exp(middle)))).cosine >= target.cosine
                low, high = (middle, high) if is_enough else (low, middle)
            step = float(np.exp(low))
        codec = fitted.codec(step)
        return Calibrated(codec, fitted.fidelity_of(codec))


def dct_matrix(size: int) -> NDArray[np.float32]:
    """Return the orthonormal DCT-II (size, size): coefficient k of x is the sum over n of matrix[k, n] x[n]."""
    k, n = np.arange(size)[:, None], np.arange(size)[None, :]
    matrix = np.sqrt(2 / size) * np.cos(np.pi * (2 * n + 1) * k / (2 * size))
    matrix[0] /= np.sqrt(2)
    return matrix.astype(np.float32)


def transform(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the DCT-II of maps (..., h, w, c) along rows and columns."""
    return _along_axes(maps, dct_matrix(maps.shape[-3]), dct_matrix(maps.shape[-2]))


def inverse(coefficients: NDArray[np.float32]) -> NDArray[np.float32]:
    """Invert `transform`."""
    return _along_axes(coefficients, dct_matrix(coefficients.shape[-3]).T, dct_matrix(coefficients.shape[-2]).T)


def _along_axes(
    maps: NDArray[np.float32], rows: NDArray[np.float32], columns: NDArray[np.float32]
) -> NDArray[np.float32]:
    *images, h, w, c = maps.shape
    # (..., h, w, c) -> along w by a product of (w, w) and (w, c), along h by one of (h, h) and (h, w c)
    along_columns = np.matmul(columns, maps)
    return np.matmul(rows, along_columns.reshape(*images, h, w * c)).reshape(*images, h, w, c)


def gains_of(coordinates: NDArray[np.float32], mean: NDArray[np.float32]) -> NDArray[np.int16]:
    """Return the gain codes (...) of tokens (..., c). mean: (c,) coordinates of the mean that was subtracted from them."""
    whole, centred = (np.square(part.astype(np.float64)).mean(axis=-1) for part in (coordinates + mean, coordinates))
    # A token much shorter than the mean would need more precision than it is worth.
    squares = np.maximum(whole, centred / SHORTEST_TOKEN**2)
    with np.errstate(divide="ignore"):
        nearest = np.rint(GAINS_PER_OCTAVE / 2 * np.log2(squares))
    return np.clip(nearest, SMALLEST_GAIN, LARGEST_GAIN).astype(np.int16)


def excess_gains(largest: NDArray[np.float32]) -> NDArray[np.int16]:
    """Return by how much the gains of maps (...) must rise so that their largest coefficients (...) fit into 16 bits."""
    ratio = np.where(np.isfinite(largest), np.maximum(largest / np.float32(LARGEST_VALUE - 1), 1), np.float32(3e38))
    return np.ceil(GAINS_PER_OCTAVE * np.log2(ratio)).astype(np.int16)


def gain_values(gains: NDArray[np.int16]) -> NDArray[np.float32]:
    """Return the gains of codes."""
    return np.exp2(gains.astype(np.float32) / np.float32(GAINS_PER_OCTAVE))


def classes_of(
    channel_scales: NDArray[np.int16], frequency_scales: NDArray[np.int16], num_classes: int
) -> NDArray[np.int64]:
    """Return the class (h, w, c) of every coefficient: half octaves of its expected magnitude."""
    scales = frequency_scales.astype(np.int64)[:, :, None] + channel_scales.astype(np.int64)
    return np.clip(scales // SCALES_PER_CLASS, 0, num_classes - 1)


def round_coefficients(coefficients: NDArray[np.float32], thresholds: NDArray[np.float32]) -> NDArray[np.int16]:
    """Round coefficients in steps (..., h, w, c) with dead zones. thresholds: (h, w, c, 2) of their classes."""
    magnitude = np.abs(coefficients)
    rounded = np.maximum(np.floor(magnitude + 1 - thresholds[..., 1]), 1)
    return (np.sign(coefficients) * np.where(magnitude < thresholds[..., 0], 0, rounded)).astype(np.int16)


def expand(coefficients: NDArray[np.int16], shrink: tuple[float, float]) -> NDArray[np.float32]:
    """Return the coefficients in steps that integers stand for: the mean of those that are rounded to them."""
    values = coefficients.astype(np.float32)
    offsets = np.where(np.abs(values) > 1, np.float32(shrink[1]), np.float32(shrink[0]))
    return values + np.sign(values) * offsets


@dataclass(frozen=True, eq=False)
class _Fitted:
    """A calibration sample, transformed, from which a codec follows for every step.

    Args:
        coefficients: (n, h, w, c) transformed maps of the calibration.
        gains: (n, h, w) their gain codes.
        held_out: (m, h, w, c) coordinates of the held-out maps.
        valid: (m, h, w) tokens of them that show the image.
        logs: (h, w), (c,) base-2 logarithms of the scales of frequencies and channels.
    """

    basis: KltBasis
    coefficients: NDArray[np.float32]
    gains: NDArray[np.int16]
    held_out: NDArray[np.float32]
    valid: NDArray[np.bool_]
    logs: tuple[NDArray[np.float64], NDArray[np.float64]]

    @classmethod
    def of(cls, sample: CalibrationSample, maps: CalibrationMaps) -> "_Fitted":
        if sample.basis is not None:
            basis, fitted, held_out = sample.basis, maps.fitted, maps.held_out
        else:
            if sample.moments is None:
                raise ValueError("a calibration sample has neither moments nor a basis")
            basis = KltBasis.fit(sample.moments)
            fitted, held_out = basis.forward(maps.fitted), basis.forward(maps.held_out)
        if not len(fitted) or not maps.valid.any():
            raise CodecError(
                "there are too few maps to calibrate the codec klt, ans on: add images, or take --codec half"
            )
        gains = gains_of(fitted, basis.rotated_mean)
        coefficients = transform(fitted / gain_values(gains)[..., None])
        # Half a Laplace distribution's variance is the square of its mean magnitude.
        logs = np.log2(np.sqrt(np.square(coefficients.astype(np.float64)).mean(axis=0) / 2) + 1e-9)
        # The least-squares fit of a sum of one number per frequency and one per channel.
        frequency, channel = logs.mean(axis=2) - logs.mean(), logs.mean(axis=(0, 1))
        # The logarithm of a mean is above the mean of logarithms: scaled back to the measured energy.
        model = np.exp2(2 * (frequency[:, :, None] + channel))
        channel = channel + 0.5 * np.log2(np.exp2(2 * logs).sum() / model.sum())
        return cls(basis, coefficients, gains, held_out, maps.valid, (frequency, channel))

    def codec(self, step: float) -> KltAns:
        """Return the codec with this step; its tables are those of the calibration maps."""
        frequency, channel = self.logs
        zero = math.log2(_SMALLEST_MAGNITUDE) + math.log2(step)
        frequency_scales = np.rint(SCALES_PER_OCTAVE * frequency).astype(np.int16)
        channel_scales = np.rint(SCALES_PER_OCTAVE * (channel - zero)).astype(np.int16)
        classes = classes_of(channel_scales, frequency_scales, MAX_CLASSES)
        num_classes = int(classes.max()) + 1
        middle = (np.arange(num_classes) + 0.5) * SCALES_PER_CLASS / SCALES_PER_OCTAVE
        magnitudes = _SMALLEST_MAGNITUDE * np.exp2(middle)
        thresholds = dead_zones(magnitudes)
        scaled = self.coefficients / np.float32(step)
        integers = round_coefficients(scaled, thresholds[classes])
        sizes = np.abs(integers)
        shrink = tuple(
            float(np.clip((np.abs(scaled[chosen]) - sizes[chosen]).mean(), -0.5, 0.5)) if chosen.any() else 0.0
            for chosen in (sizes == 1, sizes > 1)
        )
        counts = np.zeros((num_classes + 1, SYMBOLS))
        for number in range(num_classes):
            chosen = np.bincount(
                np.minimum(sizes[:, classes == number].ravel(), SYMBOLS // 2), minlength=SYMBOLS // 2 + 1
            )
            counts[number] = _signed(chosen + _PRIOR_SYMBOLS * laplace(float(magnitudes[number])))
        differences = np.abs(np.diff(self.gains.reshape(len(self.gains), -1), axis=1, prepend=np.int16(0))[:, 1:])
        steps = np.bincount(np.minimum(differences.ravel(), SYMBOLS // 2), minlength=SYMBOLS // 2 + 1)
        counts[-1] = _signed(steps + _PRIOR_SYMBOLS * laplace(1.0))
        return KltAns(
            self.basis,
            step,
            (shrink[0], shrink[1]),
            channel_scales,
            frequency_scales,
            frequencies_of(counts),
            thresholds,
        )

    def fidelity_of(self, codec: KltAns) -> Fidelity:
        """Measure the held-out tokens that show the image."""
        decoded = codec.dequantise(*codec.quantise(self.held_out))
        mean = self.basis.rotated_mean
        return measure_fidelity(self.held_out[self.valid] + mean, decoded[self.valid] + mean)


def laplace(magnitude: float) -> NDArray[np.float64]:
    """Return the probabilities of |q| = 0, 1 ... 128 (or more) of a rounded Laplace variable with this mean magnitude."""
    edges = np.exp(-np.maximum(np.arange(SYMBOLS // 2 + 2) - 0.5, 0) / magnitude)
    edges[-1] = 0
    return edges[:-1] - edges[1:]


def dead_zones(magnitudes: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the thresholds (n, 2) that minimise squared error + _TRADE * bits of Laplace variables.

    The step from 0 to 1 costs the difference of their bits, a sign included, and each further step a constant.
    """
    decay = np.exp(-0.5 / magnitudes)
    zero_bits, one_bits = -np.log2(1 - decay), -np.log2((1 / decay - decay) / 2) + np.log2(np.e) / magnitudes
    further_bits = np.log2(np.e) / magnitudes
    return (0.5 + _TRADE / 2 * np.stack([one_bits - zero_bits, further_bits], axis=1)).astype(np.float32)


def _signed(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return counts of symbols (256,) from counts of magnitudes (129,): signs are equally likely."""
    symbols = np.zeros(SYMBOLS)
    symbols[0] = counts[0]
    symbols[1:ESCAPE:2] = counts[1 : SYMBOLS // 2] / 2
    symbols[2:ESCAPE:2] = counts[1 : SYMBOLS // 2] / 2
    symbols[ESCAPE] = counts[SYMBOLS // 2]
    return symbols
