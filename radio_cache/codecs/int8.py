"""One byte a value: a scale per channel, and an exponent per token for tokens larger than any in the calibration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from radio_cache.codecs.base import TOKEN_AXES, Calibrated, CalibrationSample, CalibrationTarget, Needs
from radio_cache.codecs.limits import LARGEST_FEATURE, not_finite, too_few_tokens
from radio_cache.errors import StoreError
from radio_cache.statistics.fidelity import measure_fidelity

LARGEST = 127
"""The largest code of a channel. The smallest is -127: -128 marks a hole in the store."""

MAX_EXPONENT = 100
"""The largest exponent of a token. A scale times 2^100 is beyond every feature that the codec accepts."""


@dataclass(frozen=True, eq=False)
class Int8:
    """Store q = round(x / (scale 2^e)): a scale per channel, and an exponent e per token in the token's last byte.

    1 + 1/c bytes a value. e is 0 unless a value of the token exceeds 127 scale, so nothing saturates.
    Bound: |decode(encode(x)) - x| <= scale 2^e / 2 (and a float32 rounding), with 2^e < 2 max(|x| / scale) / 127 or e = 0.
    Values beyond 2^60 raise CodecError.

    Args:
        scale: (c,) float32, the feature that code 1 stands for.
    """

    needs: ClassVar[Needs] = "tokens"
    reaches_fidelity: ClassVar[bool] = False

    scale: NDArray[np.float32]

    @classmethod
    def fit(cls, tokens: NDArray[np.float32]) -> "Int8":
        """Return the codec whose scales put the largest magnitude of each channel of tokens (n, c) at code 127.

        Raises:
            CodecError: if there are no tokens.
        """
        if not len(tokens):
            raise too_few_tokens(0, "int8")
        largest = np.abs(tokens).max(axis=0)  # (c,)
        # A channel that is zero in the sample still needs a scale: a millionth of the loudest channel's.
        floor = max(float(largest.max()) * 1e-6, 1e-30)
        return cls((np.maximum(largest, floor) / LARGEST).astype(np.float32))

    @property
    def name(self) -> str:
        """Name on the command line: "int8"."""
        return "int8"

    @property
    def dtype(self) -> np.dtype[Any]:
        """int8."""
        return np.dtype("int8")

    @property
    def fill_value(self) -> float:
        """-128, which is no code."""
        return -128

    @property
    def zstd_level(self) -> int | None:
        """None: channels fill their range, so that zstd saves little."""
        return None

    @property
    def row_axes(self) -> tuple[str, ...]:
        """Tokens, and their channels with the exponent behind."""
        return (*TOKEN_AXES, "code")

    @property
    def channel_transform(self) -> None:
        """None: coordinates are features."""
        return None

    @property
    def transcodable(self) -> None:
        """None: there is one packing."""
        return None

    def row_shape(self, grid_hw: tuple[int, int], channels: int) -> tuple[int, ...]:
        """Return (h, w, c + 1)."""
        return (*grid_hw, channels + 1)

    def encode(self, features: NDArray[np.float32]) -> NDArray[np.int8]:
        """Encode features (..., h, w, c) to codes (..., h, w, c + 1).

        Raises:
            CodecError: for magnitudes above 2^60, infinity and NaN.
        """
        scaled = features / self.scale
        largest = np.abs(scaled).max(axis=-1, keepdims=True)
        # Both bounds, as scales may be tiny. `not <=` refuses NaN, too.
        magnitude = float(np.abs(features).max(initial=0))
        if not magnitude <= LARGEST_FEATURE or not largest.max(initial=0) < LARGEST * 2.0**MAX_EXPONENT:
            raise not_finite(magnitude)
        # frexp is exact: largest / 127 = m 2^e with m in [1/2, 1), so 2^e is the smallest power of two above it.
        exponent = np.maximum(np.frexp(largest / np.float32(LARGEST))[1], 0)
        exponent = np.where(largest < LARGEST + 0.5, 0, exponent)  # a value that rounds to 127 fits as it is
        codes = np.rint(np.ldexp(scaled, -exponent))
        return np.concatenate([codes, exponent], axis=-1).astype(np.int8)

    def decode(self, codes: NDArray[np.int8]) -> NDArray[np.float32]:
        """Decode codes (..., h, w, c + 1) to features (..., h, w, c)."""
        # Clipped for damaged bytes: no exponent is negative.
        exponent = np.clip(codes[..., -1:].astype(np.int32), 0, MAX_EXPONENT)
        return np.ldexp(codes[..., :-1].astype(np.float32), exponent) * self.scale

    def to_json(self) -> dict[str, Any]:
        """Return the name alone."""
        return {"name": self.name}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the scales."""
        return {"scale": self.scale}

    @classmethod
    def from_json(cls, data: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> "Int8":
        """Build the codec from its array of scales.

        Raises:
            StoreError: if the array is missing.
        """
        del data  # all parameters are in the array
        if "scale" not in arrays:
            raise StoreError("codec int8: the array 'scale' is missing")
        return cls(np.asarray(arrays["scale"], np.float32))

    @classmethod
    def calibrate(cls, target: CalibrationTarget, sample: CalibrationSample) -> Calibrated:
        """Fit the scales to the tokens and measure them on the held-out ones."""
        del target  # the number of bits is fixed
        codec = cls.fit(sample.tokens)
        return Calibrated(codec, measure_fidelity(sample.held_out, codec.decode(codec.encode(sample.held_out))))
