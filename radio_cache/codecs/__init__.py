"""How features become stored numbers. A codec is a small frozen value; what is stored and what is built are one thing."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from radio_cache.codecs.half import Half
from radio_cache.codecs.int8 import Int8
from radio_cache.codecs.klt_packed import KltPacked
from radio_cache.codecs.klt_zstd import KltZstd
from radio_cache.errors import StoreError, UnsupportedFormatError

__all__ = [
    "CODECS",
    "Codec",
    "Half",
    "Int8",
    "KltPacked",
    "KltZstd",
    "codec_from_json",
    "codec_label",
    "refuse_unknown",
]


class Codec(Protocol):
    """The contract every codec keeps; one test body runs over all of `CODECS`."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored codes, little-endian."""
        ...

    @property
    def fill_value(self) -> float:
        """Codes of an image are never all this value, so that a hole in the store is visible to every Zarr reader."""
        ...

    @property
    def zstd_level(self) -> int | None:
        """None: chunks are plain bytes. Otherwise the level of Zarr's `zstd` codec between `bytes` and `crc32c`."""
        ...

    def row_shape(self, grid_hw: tuple[int, int], channels: int) -> tuple[int, ...]:
        """Stored shape of one image's map."""
        ...

    def encode(self, features: NDArray[np.float32], /) -> NDArray[Any]:
        """Features (..., h, w, c) to codes (..., *row_shape). Raises CodecError on values it cannot keep its bound for."""
        ...

    def decode(self, codes: NDArray[Any], /) -> NDArray[np.float32]:
        """Codes (..., *row_shape) back to float32 features (..., h, w, c)."""
        ...

    def to_json(self) -> dict[str, Any]: ...

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What decoding needs beside the JSON; stored below the teacher's `transform/`, by these names."""
        ...


CODECS: dict[str, Callable[[dict[str, Any], Mapping[str, NDArray[Any]]], Codec]] = {
    "half": Half.from_json,
    "int8": Int8.from_json,
    "klt/packed": KltPacked.from_json,
    "klt/zstd": KltZstd.from_json,
}
"""Codec name, and packing if it has one -> how to build it from its stored JSON and arrays."""

_NO_ARRAYS: Mapping[str, NDArray[Any]] = {}


def codec_from_json(
    data: dict[str, Any], arrays: Mapping[str, NDArray[Any]] = _NO_ARRAYS, *, channels: int | None = None
) -> Codec:
    """The codec that a teacher's group was written with.

    channels: of the teacher, which must be the codec's, too, if it depends on them.
    Raises UnsupportedFormatError for names of the future, StoreError for parameters and arrays no codec has.
    """
    refuse_unknown(data)
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise StoreError(f"codec {codec_label(data)}: the array '{name}' holds values that are not finite")
    try:
        codec = CODECS[codec_label(data)](data, arrays)
    except (KeyError, TypeError, ValueError, OverflowError) as exc:
        raise StoreError(f"codec {codec_label(data)}: impossible parameters ({exc!r:.100})") from exc
    known = {"mean", "scale"} & codec.arrays().keys()
    if channels is not None and any(codec.arrays()[name].shape != (channels,) for name in known):
        raise StoreError(f"codec {codec_label(data)}: its arrays are not those of a teacher with {channels} channels")
    return codec


def refuse_unknown(data: dict[str, Any], place: str | None = None) -> None:
    """Raise UnsupportedFormatError for a codec that this version does not have. place: of the document that names it."""
    name = codec_label(data)
    if name not in CODECS:
        raise UnsupportedFormatError(
            f"{f'{place}: ' if place else ''}codec '{name:.40}' is not known here (known: {', '.join(CODECS)}): "
            "install the radio-cache that wrote the cache"
        )


def codec_label(data: dict[str, Any]) -> str:
    """A stored codec's key in `CODECS`: "half", "klt/zstd"."""
    return "/".join(str(data[key]) for key in ("name", "packing") if key in data)
