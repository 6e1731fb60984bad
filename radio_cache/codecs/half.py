"""Two bytes a value: IEEE half precision. The reference the smaller codecs are compared with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import CodecError


@dataclass(frozen=True)
class Half:
    """Rounds to float16: 2 bytes a value.

    Bound: |decode(encode(x)) - x| <= max(|x| * 2^-11, 2^-25), for |x| < 65520.
    Larger, infinite and NaN values raise CodecError: half precision would silently turn them into infinity.
    """

    @property
    def name(self) -> str:
        return "half"

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("<f2")

    @property
    def fill_value(self) -> float:
        return float("nan")

    @property
    def zstd_level(self) -> int | None:
        return None

    def row_shape(self, grid_hw: tuple[int, int], channels: int) -> tuple[int, ...]:
        return (*grid_hw, channels)

    def encode(self, features: NDArray[np.float32]) -> NDArray[np.float16]:
        with np.errstate(over="ignore"):
            codes = features.astype(self.dtype)
        if not np.isfinite(codes).all():
            worst = float(np.abs(features).max())
            raise CodecError(
                f"codec half holds values below 65520, and the teacher returned {worst:g}; "
                "if that is NaN or inf, run the teacher with --dtype float32"
            )
        return codes

    def decode(self, codes: NDArray[np.float16]) -> NDArray[np.float32]:
        return codes.astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name}

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {}

    @classmethod
    def from_json(cls, data: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> "Half":
        del data, arrays  # nothing but the name
        return cls()
