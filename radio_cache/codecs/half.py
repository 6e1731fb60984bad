"""Two bytes a value: IEEE half precision. The reference that the smaller codecs are compared with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from radio_cache.codecs.base import TOKEN_AXES, Calibrated, CalibrationSample, CalibrationTarget, Needs
from radio_cache.errors import CodecError
from radio_cache.statistics.fidelity import measure_fidelity


@dataclass(frozen=True)
class Half:
    """Round to float16: 2 bytes a value.

    Bound: |decode(encode(x)) - x| <= max(|x| * 2^-11, 2^-25), for |x| < 65520.
    Larger, infinite and NaN values raise CodecError: half precision would silently turn them into infinity.
    """

    needs: ClassVar[Needs] = "nothing"
    reaches_fidelity: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Name on the command line: "half"."""
        return "half"

    @property
    def dtype(self) -> np.dtype[Any]:
        """float16."""
        return np.dtype("<f2")

    @property
    def fill_value(self) -> float:
        """NaN, which `encode` never returns."""
        return float("nan")

    @property
    def zstd_level(self) -> int | None:
        """None: the low bits of features do not compress."""
        return None

    @property
    def row_axes(self) -> tuple[str, ...]:
        """Tokens and their channels."""
        return (*TOKEN_AXES, "channel")

    @property
    def channel_transform(self) -> None:
        """None: codes are features."""
        return None

    @property
    def transcodable(self) -> None:
        """None: there is one packing."""
        return None

    def row_shape(self, grid_hw: tuple[int, int], channels: int) -> tuple[int, ...]:
        """Return (h, w, c)."""
        return (*grid_hw, channels)

    def encode(self, features: NDArray[np.float32]) -> NDArray[np.float16]:
        """Round features (..., h, w, c) to float16.

        Raises:
            CodecError: for magnitudes of 65520 and more, and NaN.
        """
        # Overflow is found below, and named with the value.
        with np.errstate(over="ignore"):
            codes = features.astype(self.dtype)
        if not np.isfinite(codes).all():
            raise beyond_half(float(np.abs(features).max()))
        return codes

    def decode(self, codes: NDArray[np.float16]) -> NDArray[np.float32]:
        """Widen codes to float32."""
        return codes.astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """Return the name alone."""
        return {"name": self.name}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return no arrays."""
        return {}

    @classmethod
    def from_json(cls, data: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> "Half":
        """Build the codec, which has no parameters."""
        del data, arrays  # half has no parameters
        return cls()

    @classmethod
    def calibrate(cls, target: CalibrationTarget, sample: CalibrationSample) -> Calibrated:
        """Measure the rounding on the held-out tokens."""
        del target  # the error of half follows from its type
        codec = cls()
        return Calibrated(codec, measure_fidelity(sample.held_out, codec.decode(codec.encode(sample.held_out))))


def beyond_half(magnitude: float) -> CodecError:
    """Return the error for features that half precision cannot hold. magnitude: the largest among them."""
    return CodecError(
        f"codec half holds values below 65520, and the teacher returned {magnitude:g}; "
        "if that is NaN or inf, run the teacher with --dtype float32"
    )
