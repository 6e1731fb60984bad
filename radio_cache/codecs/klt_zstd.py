"""Entropy-coded klt: a uniform step in the Karhunen-Loeve basis, integer codes, zstd. The smallest."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from radio_cache.codecs.klt_basis import KltBasis, not_finite
from radio_cache.errors import StoreError

Layout = Literal["planes", "bytes", "nibbles"]
"""How integers lie in a row; see `KltZstd`."""

LARGEST: dict[Layout, int] = {"planes": 127 * 256 + 127, "bytes": 127 * 256 + 127, "nibbles": 127 * 16 + 7}
"""The largest code: the upper part is a signed byte and never -128, which marks a hole."""

GAINS_PER_OCTAVE = 4
SMALLEST_GAIN, LARGEST_GAIN = -127, 127


@dataclass(frozen=True, eq=False)
class KltZstd:
    """q = round(y / (step a)) for coordinates y of `KltBasis` and a token's gain a = 2^(g / 4), under zstd.

    g = round(4 log2(rms of y)): loud tokens are rounded as finely as quiet ones, in proportion, which is what a cosine
    asks for; it takes an eighth off the bits (docs/log.md). Weak channels cost next to nothing: their codes are zero. PHI-S
    targets are step a H q, without the basis (`radio_cache.statistics.phi_s`). Wide codes are there for the few that
    need them, and
    nothing saturates: codes beyond `LARGEST` raise CodecError.
    Bound: |y' - y| <= step a / 2 in every coordinate, so a token is off by at most phi step a sqrt(c) / 2.

    step: in units of phi. level: of zstd. layout, channel by channel always, below a plane of gains:
        "bytes": low and high bytes in planes, both signed: q = low + 256 high. High bytes are nearly all zero.
        "nibbles": q = low + 16 high; of each two rows of tokens (all channels, one below the other) the low nibbles, signed, in
        one byte: zstd takes no less than a bit for a byte, and two small codes that go together are worth less than twice that.
        "planes": bytes, without gains (a = 1), as the first caches have them.
    """

    basis: KltBasis
    step: float
    layout: Layout = "bytes"
    level: int = 3

    @property
    def name(self) -> str:
        return "klt"

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("int8")

    @property
    def fill_value(self) -> float:
        return -128

    @property
    def zstd_level(self) -> int | None:
        return self.level

    def row_shape(self, grid_hw: tuple[int, int], channels: int) -> tuple[int, ...]:
        h, w = grid_hw
        if self.layout == "planes":
            return (2, channels, h, w)
        if self.layout == "bytes":
            return ((1 + 2 * channels) * h, w)
        return (h - (-channels * h // 2) + channels * h, w)

    def grid_height(self, row_height: int) -> int:
        """Tokens from top to bottom of a map whose row is so high; not for "planes"."""
        channels = self.basis.channels
        if self.layout == "bytes":
            return row_height // (1 + 2 * channels)
        return 2 * row_height // (2 + 3 * channels)  # where there is an odd row, its half is rounded off

    def encode(self, features: NDArray[np.float32]) -> NDArray[np.int8]:
        return self.codes_of(self.basis.forward(features))

    def codes_of(self, coordinates: NDArray[np.float32]) -> NDArray[np.int8]:
        """Coordinates (..., h, w, c) as stored: (..., *row_shape)."""
        return self.rows_of(*self.quantise(coordinates))

    def rows_of(self, gains: NDArray[np.int8], integers: NDArray[np.int32]) -> NDArray[np.int8]:
        """Gains (..., h, w) and integers (..., h, w, c) as stored: (..., *row_shape)."""
        low, high = split(np.moveaxis(integers, -1, -3), self.layout)
        if self.layout == "planes":
            return np.stack([low, high], axis=-4)
        return np.concatenate([gains, low, _flat(high)], axis=-2)

    def decode(self, codes: NDArray[np.int8]) -> NDArray[np.float32]:
        return self.basis.inverse(self.coordinates(codes))

    def quantise(self, coordinates: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.int32]]:
        """Coordinates (..., c) to gains (...) and integers (..., c)."""
        gains = self._gains(coordinates)
        scaled = np.rint(coordinates / self._steps(gains)[..., None])
        if not float(np.abs(scaled).max(initial=0)) <= LARGEST[self.layout]:
            raise not_finite(float(np.abs(coordinates).max()) * self.basis.phi)
        return gains, scaled.astype(np.int32)

    def dequantise(self, gains: NDArray[np.int8], integers: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Gains (...) and integers (..., c) to coordinates (..., c)."""
        return integers.astype(np.float32) * self._steps(gains)[..., None]

    def coordinates(self, codes: NDArray[np.int8]) -> NDArray[np.float32]:
        """Stored codes (..., *row_shape) to coordinates (..., h, w, c)."""
        if self.layout == "planes":
            low, high = codes[..., 0, :, :, :], codes[..., 1, :, :, :]
            gains = np.zeros(low[..., 0, :, :].shape, np.int8)
        else:
            (*images, row_height, w), c = codes.shape, self.basis.channels
            h = self.grid_height(row_height)
            gains, low, high = np.split(codes, [h, row_height - c * h], axis=-2)
            high = high.reshape(*images, c, h, w)
        return self.dequantise(gains, np.moveaxis(joined(low, high, self.layout), -3, -1))

    def _gains(self, coordinates: NDArray[np.float32]) -> NDArray[np.int8]:
        if self.layout == "planes":
            return np.zeros(coordinates.shape[:-1], np.int8)
        squares = np.square(coordinates.astype(np.float64)).mean(axis=-1)
        with np.errstate(divide="ignore"):
            wanted = np.rint(GAINS_PER_OCTAVE / 2 * np.log2(squares))
        return np.clip(wanted, SMALLEST_GAIN, LARGEST_GAIN).astype(np.int8)

    def _steps(self, gains: NDArray[np.int8]) -> NDArray[np.float32]:
        return np.float32(self.step) * np.exp2(gains.astype(np.float32) / np.float32(GAINS_PER_OCTAVE))

    def to_json(self) -> dict[str, Any]:
        layout = {} if self.layout == "planes" else {"layout": self.layout}  # as the first caches had it
        return {"name": self.name, "packing": "zstd", "step": self.step, "level": self.level, **layout}

    def arrays(self) -> dict[str, NDArray[Any]]:
        return self.basis.arrays()

    @classmethod
    def from_json(cls, data: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> "KltZstd":
        step, level, layout = float(data["step"]), data["level"], data.get("layout", "planes")
        if not 0 < step < math.inf or type(level) is not int:
            raise StoreError(f"codec klt, zstd: step {step:g} and level {level!r:.20} are impossible")
        if layout not in get_args(Layout):
            raise StoreError(f"codec klt, zstd: the layout {layout!r:.20} is not one of {', '.join(get_args(Layout))}")
        return cls(KltBasis.from_arrays(arrays), step, layout, level)


def split(integers: NDArray[np.int32], layout: Layout) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Integers (..., c, h, w) in two parts: low, of the same shape for "planes", else (..., rows, w), and high (..., c, h, w)."""
    if layout != "nibbles":
        low = integers.astype(np.int8)  # wraps around
        return low if layout == "planes" else _flat(low), ((integers - low) >> 8).astype(np.int8)
    low = ((integers + 8) & 15) - 8
    high, low = ((integers - low) >> 4).astype(np.int8), _flat(low)
    if low.shape[-2] % 2:
        low = np.concatenate([low, np.zeros_like(low[..., :1, :])], axis=-2)
    return (low[..., 0::2, :] & 15 | low[..., 1::2, :] << 4).astype(np.int8), high


def joined(low: NDArray[np.int8], high: NDArray[np.int8], layout: Layout) -> NDArray[np.int16]:
    """The integers of `split`."""
    if layout != "nibbles":
        return low.astype(np.int16).reshape(high.shape) + high.astype(np.int16) * np.int16(256)
    upper = (low << np.int8(4)) >> np.int8(4)  # the shift to the right keeps the sign
    *images, row_pairs, w = low.shape  # spelled out, because a size of -1 cannot be found for no images
    pairs = np.stack([upper, low >> np.int8(4)], axis=-2).reshape(*images, 2 * row_pairs, w)
    rows = pairs[..., : high.shape[-3] * high.shape[-2], :].reshape(high.shape)
    return rows.astype(np.int16) + high.astype(np.int16) * np.int16(16)


def _flat(channels: NDArray[Any]) -> NDArray[Any]:
    """(..., c, h, w) to (..., c h, w)."""
    *images, c, h, w = channels.shape
    return channels.reshape(*images, c * h, w)


def fits_nibbles(step: float, channels: int) -> bool:
    """Return whether no code can be too large: a channel is at most sqrt(c) times its token's root mean square."""
    return math.sqrt(channels) * 2 ** (1 / (2 * GAINS_PER_OCTAVE)) / step + 1 < LARGEST["nibbles"]
