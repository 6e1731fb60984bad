"""How features become stored numbers. A codec is a small frozen value; what is stored and what is built are one thing."""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from radio_cache.codecs.half import Half
from radio_cache.errors import UnsupportedFormatError

__all__ = ["CODECS", "Codec", "Half", "codec_from_json"]


class Codec(Protocol):
    """The contract every codec keeps; one test body runs over all of `CODECS`."""

    name: ClassVar[str]
    dtype: ClassVar[np.dtype[Any]]
    """Type of the stored codes, little-endian."""
    fill_value: ClassVar[float]
    """A code that `encode` never returns, so that a hole in the store is visible to every Zarr reader."""

    def encode(self, features: NDArray[np.float32], /) -> NDArray[Any]:
        """Features (..., c) to codes of the same shape. Raises CodecError on values it cannot keep its bound for."""
        ...

    def decode(self, codes: NDArray[Any], /) -> NDArray[np.float32]:
        """Codes (..., c) back to float32 features."""
        ...

    def to_json(self) -> dict[str, Any]: ...


CODECS: dict[str, Callable[[dict[str, Any]], Codec]] = {
    "half": Half.from_json,
}
"""Codec name -> how to build it from its stored JSON."""


def codec_from_json(data: dict[str, Any]) -> Codec:
    """The codec that a teacher's group was written with. Raises UnsupportedFormatError for names of the future."""
    name = data.get("name")
    if name not in CODECS:
        raise UnsupportedFormatError(
            f"codec '{name}' is not known here (known: {', '.join(CODECS)}): install the radio-cache that wrote the cache"
        )
    return CODECS[name](data)
