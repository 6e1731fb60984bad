"""Entropy-coded klt: a uniform step in the Karhunen-Loeve basis, integer codes, zstd. The smallest."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radio_cache.codecs.klt_basis import KltBasis, not_finite
from radio_cache.errors import StoreError

LARGEST = 127 * 256 + 127
"""Codes have two bytes; the high byte never is -128, which marks a hole."""


@dataclass(frozen=True, eq=False)
class KltZstd:
    """q = round(y / step) for coordinates y of `KltBasis`, stored as two planes of bytes, channel by channel, under zstd.

    Weak channels cost next to nothing: their codes are zero. q = low + 256 high with both bytes signed: planes of high
    bytes are nearly all zero, so wide codes are there for the few that need them, and nothing saturates. Codes beyond
    +-32639 raise CodecError. PHI-S targets are step H q, without the basis (`radio_cache.phi_s`).
    Bound: |y' - y| <= step / 2 in every coordinate, so a token is off by at most phi step sqrt(c) / 2.

    step: in units of phi. level: of zstd.
    """

    basis: KltBasis
    step: float
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
        return (2, channels, *grid_hw)

    def encode(self, features: NDArray[np.float32]) -> NDArray[np.int8]:
        return self.codes_of(self.basis.forward(features))

    def codes_of(self, coordinates: NDArray[np.float32]) -> NDArray[np.int8]:
        """Coordinates (..., h, w, c) as stored: (..., 2, c, h, w)."""
        return self.planes(self.quantise(coordinates))

    def decode(self, codes: NDArray[np.int8]) -> NDArray[np.float32]:
        return self.basis.inverse(self.coordinates(codes))

    def quantise(self, coordinates: NDArray[np.float32]) -> NDArray[np.int32]:
        """Coordinates (..., c) to integers (..., c)."""
        scaled = np.rint(coordinates / np.float32(self.step))
        worst = float(np.abs(scaled).max(initial=0))
        if not worst <= LARGEST:
            raise not_finite(worst * self.step * self.basis.phi)
        return scaled.astype(np.int32)

    def coordinates(self, codes: NDArray[np.int8]) -> NDArray[np.float32]:
        """Stored codes (..., 2, c, h, w) to coordinates (..., h, w, c)."""
        integers = codes[..., 0, :, :, :].astype(np.int16) + codes[..., 1, :, :, :].astype(np.int16) * np.int16(256)
        return np.moveaxis(integers.astype(np.float32) * np.float32(self.step), -3, -1)

    @staticmethod
    def planes(integers: NDArray[np.int32]) -> NDArray[np.int8]:
        """Integers (..., h, w, c) as stored: (..., 2, c, h, w), low bytes and high bytes."""
        integers = np.moveaxis(integers, -1, -3)
        low = integers.astype(np.int8)  # wraps around
        high = ((integers - low) >> 8).astype(np.int8)
        return np.stack([low, high], axis=-4)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "packing": "zstd", "step": self.step, "level": self.level}

    def arrays(self) -> dict[str, NDArray[Any]]:
        return self.basis.arrays()

    @classmethod
    def from_json(cls, data: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> "KltZstd":
        step, level = float(data["step"]), data["level"]
        if not 0 < step < math.inf or type(level) is not int:
            raise StoreError(f"codec klt, zstd: step {step:g} and level {level!r:.20} are impossible")
        return cls(KltBasis.from_arrays(arrays), step, level)
