"""Entropy-coded klt: a uniform step in the Karhunen-Loeve basis, integer codes, zstd. The smallest."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import zstandard
from numpy.typing import NDArray

from radio_cache.codecs.base import Calibrated, CalibrationSample, CalibrationTarget, Needs
from radio_cache.codecs.klt_basis import KltBasis
from radio_cache.codecs.klt_calibration import KltSample, refuse_if_below
from radio_cache.codecs.limits import not_finite
from radio_cache.errors import StoreError
from radio_cache.statistics.fidelity import Fidelity

Layout = Literal["planes", "bytes", "nibbles"]
"""Order of the integers in a row; see `KltZstd`."""

LARGEST: dict[Layout, int] = {"planes": 127 * 256 + 127, "bytes": 127 * 256 + 127, "nibbles": 127 * 16 + 7}
"""The largest code: the upper part is a signed byte and never -128, which marks a hole."""

SMALLEST_STEP, LARGEST_STEP = 1e-3, 8.0
"""Range of the quantiser step, in units of phi."""

GAINS_PER_OCTAVE = 4
SMALLEST_GAIN, LARGEST_GAIN = -127, 127

_SEARCH_ROUNDS = 20
"""Halvings of the range of log(step): the step is known to 1e-5 of itself."""

_LAYOUT_TOKENS = 8192
_LAYOUT_GRID_HW = (8, 8)
"""Tokens that are compressed together to compare layouts."""


@dataclass(frozen=True, eq=False)
class KltZstd:
    """Store q = round(y / (step a)) for coordinates y of `KltBasis` and a token's gain a = 2^(g / 4), under zstd.

    g = round(4 log2(rms of y)): loud tokens are rounded in proportion as finely as quiet ones, because a cosine does not
    depend on lengths. The gains save an eighth of the bits (docs/log.md). Weak channels cost next to nothing: their codes
    are zero. PHI-S targets are step a H q, without the basis (`radio_cache.statistics.phi_s`). Nothing saturates: codes
    beyond `LARGEST` raise CodecError.
    Bound: |y' - y| <= step a / 2 in every coordinate, so a token is off by at most phi step a sqrt(c) / 2.

    Rows hold a plane of gains and then channel after channel, in one of three layouts:
        "bytes": low and high bytes in planes, both signed: q = low + 256 high. High bytes are nearly all zero.
        "nibbles": q = low + 16 high, and the signed low nibbles of two rows of tokens share a byte (all channels lie one
        below the other). zstd spends at least a bit on a byte, and less than two bits on a byte of two small codes.
        "planes": bytes, without gains (a = 1), as the first caches have them.

    Args:
        step: quantiser step in units of phi.
        level: zstd's.
    """

    needs: ClassVar[Needs] = "covariance"
    reaches_fidelity: ClassVar[bool] = True

    basis: KltBasis
    step: float
    layout: Layout = "bytes"
    level: int = 3

    @property
    def name(self) -> str:
        """Name on the command line: "klt"."""
        return "klt"

    @property
    def dtype(self) -> np.dtype[Any]:
        """int8: parts of integers, and gains."""
        return np.dtype("int8")

    @property
    def fill_value(self) -> float:
        """-128, which is neither a gain nor a high part."""
        return -128

    @property
    def zstd_level(self) -> int | None:
        """Level of zstd that shards are compressed with."""
        return self.level

    @property
    def row_axes(self) -> tuple[str, ...]:
        """Numbers for names: rows and columns of tokens lie among channels and parts of integers."""
        return tuple(f"code_{number}" for number in range(4 if self.layout == "planes" else 2))

    @property
    def channel_transform(self) -> KltBasis:
        """The rotation back to features."""
        return self.basis

    @property
    def transcodable(self) -> "KltZstd":
        """The codec itself: its coordinates are those of klt/packed."""
        return self

    def row_shape(self, grid_hw: tuple[int, int], channels: int) -> tuple[int, ...]:
        """Return the shape of the layout."""
        h, w = grid_hw
        if self.layout == "planes":
            return (2, channels, h, w)
        if self.layout == "bytes":
            return ((1 + 2 * channels) * h, w)
        # Two rows of low nibbles share a row of bytes, rounded up: h + ceil(c h / 2) + c h.
        return (h - (-channels * h // 2) + channels * h, w)

    def grid_height(self, row_height: int) -> int:
        """Return the grid height of a map from the height of its stored row; not for "planes"."""
        channels = self.basis.channels
        if self.layout == "bytes":
            return row_height // (1 + 2 * channels)
        return 2 * row_height // (2 + 3 * channels)  # half a byte row without a partner is rounded off

    def encode(self, features: NDArray[np.float32]) -> NDArray[np.int8]:
        """Encode features (..., h, w, c) to codes (..., *row_shape).

        Raises:
            CodecError: for integers beyond `LARGEST`, infinity and NaN.
        """
        return self.codes_of(self.basis.forward(features))

    def codes_of(self, coordinates: NDArray[np.float32]) -> NDArray[np.int8]:
        """Encode coordinates (..., h, w, c) to codes (..., *row_shape)."""
        return self.rows_of(*self.quantise(coordinates))

    def rows_of(self, gains: NDArray[np.int8], integers: NDArray[np.int32]) -> NDArray[np.int8]:
        """Arrange gains (..., h, w) and integers (..., h, w, c) as codes (..., *row_shape)."""
        # (..., h, w, c) -> (..., c, h, w): neighbours of one channel resemble each other, which zstd uses
        low, high = split_integers(np.moveaxis(integers, -1, -3), self.layout)
        if self.layout == "planes":
            return np.stack([low, high], axis=-4)
        return np.concatenate([gains, low, _stacked(high)], axis=-2)

    def decode(self, codes: NDArray[np.int8]) -> NDArray[np.float32]:
        """Decode codes (..., *row_shape) to features (..., h, w, c)."""
        return self.basis.inverse(self.coordinates(codes))

    def quantise(self, coordinates: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.int32]]:
        """Quantise coordinates (..., c) to gains (...) and integers (..., c).

        Raises:
            CodecError: for integers beyond `LARGEST`.
        """
        gains = self._gains(coordinates)
        # `not <=` instead of `>`, so that NaN is refused, too.
        scaled = np.rint(coordinates / self._steps(gains)[..., None])
        if not float(np.abs(scaled).max(initial=0)) <= LARGEST[self.layout]:
            raise not_finite(float(np.abs(coordinates).max()) * self.basis.phi)
        return gains, scaled.astype(np.int32)

    def dequantise(self, gains: NDArray[np.int8], integers: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Return the coordinates (..., c) of gains (...) and integers (..., c)."""
        return integers.astype(np.float32) * self._steps(gains)[..., None]

    def coordinates(self, codes: NDArray[np.int8]) -> NDArray[np.float32]:
        """Decode codes (..., *row_shape) to coordinates (..., h, w, c)."""
        if self.layout == "planes":
            low, high = codes[..., 0, :, :, :], codes[..., 1, :, :, :]
            gains = np.zeros(low[..., 0, :, :].shape, np.int8)
        else:
            (*images, row_height, w), c = codes.shape, self.basis.channels
            h = self.grid_height(row_height)
            # Rows from the top: h of gains, the low parts (half as many for "nibbles"), c * h of high parts.
            gains, low, high = np.split(codes, [h, row_height - c * h], axis=-2)
            high = high.reshape(*images, c, h, w)
        return self.dequantise(gains, np.moveaxis(join_integers(low, high, self.layout), -3, -1))

    def _gains(self, coordinates: NDArray[np.float32]) -> NDArray[np.int8]:
        if self.layout == "planes":
            return np.zeros(coordinates.shape[:-1], np.int8)
        # Squares of large coordinates overflow float32.
        squares = np.square(coordinates.astype(np.float64)).mean(axis=-1)
        with np.errstate(divide="ignore"):
            nearest = np.rint(GAINS_PER_OCTAVE / 2 * np.log2(squares))
        return np.clip(nearest, SMALLEST_GAIN, LARGEST_GAIN).astype(np.int8)

    def _steps(self, gains: NDArray[np.int8]) -> NDArray[np.float32]:
        return np.float32(self.step) * np.exp2(gains.astype(np.float32) / np.float32(GAINS_PER_OCTAVE))

    def to_json(self) -> dict[str, Any]:
        """Return name, packing, step, zstd level and layout."""
        layout = {} if self.layout == "planes" else {"layout": self.layout}  # the first caches have no layout
        return {"name": self.name, "packing": "zstd", "step": self.step, "level": self.level, **layout}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the basis."""
        return self.basis.arrays()

    @classmethod
    def from_json(cls, data: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> "KltZstd":
        """Build the codec from its parameters and basis.

        Raises:
            StoreError: for impossible steps, levels and layouts, and for a damaged basis.
        """
        step, level, layout = float(data["step"]), data["level"], data.get("layout", "planes")
        if not 0 < step < math.inf or type(level) is not int:
            raise StoreError(f"codec klt, zstd: step {step:g} and level {level!r:.20} are impossible")
        if layout not in get_args(Layout):
            raise StoreError(f"codec klt, zstd: the layout {layout!r:.20} is not one of {', '.join(get_args(Layout))}")
        return cls(KltBasis.from_arrays(arrays), step, layout, level)

    @classmethod
    def calibrate(cls, target: CalibrationTarget, sample: CalibrationSample) -> Calibrated:
        """Take the target's step, or the largest one that reaches its cosine, and the layout that takes fewer bytes."""
        klt = KltSample.of(sample)
        step = target.step
        if step is None:
            # The cosine falls as the step grows: halve the range of log(step).
            low, high = np.log(SMALLEST_STEP), np.log(LARGEST_STEP)
            refuse_if_below(target, fidelity_of_step(klt, SMALLEST_STEP))
            for _ in range(_SEARCH_ROUNDS):
                middle = (low + high) / 2
                is_enough = fidelity_of_step(klt, float(np.exp(middle))).cosine >= target.cosine
                low, high = (middle, high) if is_enough else (low, middle)
            step = float(np.exp(low))
        return Calibrated(_smallest_layout(klt.basis, step, klt.held_out), fidelity_of_step(klt, step))


def fidelity_of_step(sample: KltSample, step: float) -> Fidelity:
    """Measure a quantiser step on the held-out tokens of a sample; the layout makes no difference."""
    codec = KltZstd(sample.basis, step)
    return sample.fidelity_of(codec.dequantise(*codec.quantise(sample.held_out)))


def _smallest_layout(basis: KltBasis, step: float, coordinates: NDArray[np.float32]) -> KltZstd:
    """Return the codec whose layout compresses these tokens best, in blocks of about an image each."""
    codec = KltZstd(basis, step)
    if not fits_nibbles(step, basis.channels):
        return codec
    block = math.prod(_LAYOUT_GRID_HW)
    count = min(len(coordinates), _LAYOUT_TOKENS) // block * block
    # (n, c) -> (blocks, 8, 8, c); fewer tokens than a block make a column of their own
    maps = coordinates[:count].reshape(-1, *_LAYOUT_GRID_HW, basis.channels) if count else coordinates[None, :, None]
    return min((codec, replace(codec, layout="nibbles")), key=lambda candidate: _compressed_bytes(candidate, maps))


def _compressed_bytes(codec: KltZstd, maps: NDArray[np.float32]) -> int:
    compressor = zstandard.ZstdCompressor(level=codec.level)
    return sum(len(compressor.compress(row.tobytes())) for row in codec.codes_of(maps))


def split_integers(integers: NDArray[np.int32], layout: Layout) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Split integers (..., c, h, w) into a low and a high part.

    Args:
        integers: codes of all channels, at most `LARGEST` of the layout.
        layout: one of `Layout`.

    Returns:
        low (..., c, h, w) for "planes" and (..., rows, w) for other layouts, and high (..., c, h, w).
    """
    if layout != "nibbles":
        low = integers.astype(np.int8)  # wraps around
        return low if layout == "planes" else _stacked(low), ((integers - low) >> 8).astype(np.int8)
    low = ((integers + 8) & 15) - 8  # -8 to 7, so that small negative integers have a high part of 0
    high, low = ((integers - low) >> 4).astype(np.int8), _stacked(low)
    if low.shape[-2] % 2:
        # The last row of an odd number has a row of zeros for a partner.
        low = np.concatenate([low, np.zeros_like(low[..., :1, :])], axis=-2)
    return (low[..., 0::2, :] & 15 | low[..., 1::2, :] << 4).astype(np.int8), high


def join_integers(low: NDArray[np.int8], high: NDArray[np.int8], layout: Layout) -> NDArray[np.int16]:
    """Return the integers (..., c, h, w) that `split_integers` made these parts of."""
    if layout != "nibbles":
        return low.astype(np.int16).reshape(high.shape) + high.astype(np.int16) * np.int16(256)
    upper = (low << np.int8(4)) >> np.int8(4)  # the shift to the right keeps the sign
    *images, row_pairs, w = low.shape  # spelled out: numpy cannot infer a size of -1 for no images
    pairs = np.stack([upper, low >> np.int8(4)], axis=-2).reshape(*images, 2 * row_pairs, w)
    rows = pairs[..., : high.shape[-3] * high.shape[-2], :].reshape(high.shape)
    return rows.astype(np.int16) + high.astype(np.int16) * np.int16(16)


def _stacked(channels: NDArray[Any]) -> NDArray[Any]:
    """Put channels (..., c, h, w) below each other: (..., c h, w)."""
    *images, c, h, w = channels.shape
    return channels.reshape(*images, c * h, w)


def fits_nibbles(step: float, channels: int) -> bool:
    """Return whether no code can be too large: a channel is at most sqrt(c) times its token's root mean square."""
    return math.sqrt(channels) * 2 ** (1 / (2 * GAINS_PER_OCTAVE)) / step + 1 < LARGEST["nibbles"]
