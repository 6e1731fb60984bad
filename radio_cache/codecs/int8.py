"""One byte a value: per-channel scales, and a shared exponent for tokens that are larger than any in the calibration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radio_cache.codecs.klt_basis import LARGEST_FEATURE, not_finite, too_few_tokens
from radio_cache.errors import StoreError

LARGEST = 127
MAX_EXPONENT = 100


@dataclass(frozen=True, eq=False)
class Int8:
    """q = round(x / (scale 2^e)) with one scale per channel and one exponent e per token, stored as the token's last byte.

    1 + 1/c bytes a value. e is 0 unless a value of the token exceeds 127 scale, so nothing saturates.
    Bound: |decode(encode(x)) - x| <= scale 2^e / 2 (and a float32 rounding), with 2^e < 2 max(|x| / scale) / 127 or e = 0.

    Values beyond 2^60 raise CodecError.

    scale (c,): float32.
    """

    scale: NDArray[np.float32]

    @classmethod
    def fit(cls, tokens: NDArray[np.float32]) -> "Int8":
        """Scales from the largest magnitude of every channel in a sample of tokens (n, c). Raises CodecError for no tokens."""
        if not len(tokens):
            raise too_few_tokens(0, "int8")
        largest = np.abs(tokens).max(axis=0)
        floor = max(float(largest.max()) * 1e-6, 1e-30)
        return cls((np.maximum(largest, floor) / LARGEST).astype(np.float32))

    @property
    def name(self) -> str:
        return "int8"

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("int8")

    @property
    def fill_value(self) -> float:
        return -128

    @property
    def zstd_level(self) -> int | None:
        return None

    def row_shape(self, grid_hw: tuple[int, int], channels: int) -> tuple[int, ...]:
        return (*grid_hw, channels + 1)

    def encode(self, features: NDArray[np.float32]) -> NDArray[np.int8]:
        scaled = features / self.scale
        largest = np.abs(scaled).max(axis=-1, keepdims=True)
        magnitude = float(np.abs(features).max(initial=0))
        if not magnitude <= LARGEST_FEATURE or not largest.max(initial=0) < LARGEST * 2.0**MAX_EXPONENT:
            raise not_finite(magnitude)
        # frexp is exact: largest / 127 = m 2^e with m in [1/2, 1), so 2^e is the smallest power of two above it.
        exponent = np.maximum(np.frexp(largest / np.float32(LARGEST))[1], 0)
        exponent = np.where(largest < LARGEST + 0.5, 0, exponent)  # what rounds to 127 fits
        codes = np.rint(np.ldexp(scaled, -exponent))
        return np.concatenate([codes, exponent], axis=-1).astype(np.int8)

    def decode(self, codes: NDArray[np.int8]) -> NDArray[np.float32]:
        exponent = np.clip(codes[..., -1:].astype(np.int32), 0, MAX_EXPONENT)
        return np.ldexp(codes[..., :-1].astype(np.float32), exponent) * self.scale

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name}

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"scale": self.scale}

    @classmethod
    def from_json(cls, data: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> "Int8":
        del data  # nothing but the name
        if "scale" not in arrays:
            raise StoreError("codec int8: the array 'scale' is not there")
        return cls(np.asarray(arrays["scale"], np.float32))
