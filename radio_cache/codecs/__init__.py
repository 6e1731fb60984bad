"""Codecs: features to stored numbers and back, in NumPy.

A new codec is one file here (`radio_cache.codecs.base.Codec` is its interface) and one line in `CODECS`, and the same in
`radio_cache.torch`, for encoding and decoding on the device.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radio_cache.codecs.base import (
    Calibrated,
    CalibrationMaps,
    CalibrationSample,
    CalibrationTarget,
    Codec,
    is_tokenwise,
)
from radio_cache.codecs.half import Half
from radio_cache.codecs.int8 import Int8
from radio_cache.codecs.klt_ans import KltAns
from radio_cache.codecs.klt_packed import KltPacked
from radio_cache.codecs.klt_zstd import KltZstd
from radio_cache.errors import StoreError, UnsupportedFormatError

__all__ = [
    "CODECS",
    "Calibrated",
    "CalibrationMaps",
    "CalibrationSample",
    "CalibrationTarget",
    "Codec",
    "Half",
    "Int8",
    "KltAns",
    "KltPacked",
    "KltZstd",
    "codec_from_json",
    "codec_label",
    "is_tokenwise",
    "label_of",
    "refuse_unknown",
]


CODECS: dict[str, type[Codec]] = {
    "half": Half,
    "int8": Int8,
    "klt/packed": KltPacked,
    "klt/zstd": KltZstd,
    "klt/ans": KltAns,
}
"""Codec name, and packing if the codec has several -> its class. `radio_cache.torch.DEVICE_CODECS` has the same keys."""

_NO_ARRAYS: Mapping[str, NDArray[Any]] = {}


def codec_from_json(
    data: dict[str, Any], arrays: Mapping[str, NDArray[Any]] = _NO_ARRAYS, *, channels: int | None = None
) -> Codec:
    """Build the codec that a teacher's group was written with.

    Args:
        data: its stored JSON, with at least the name.
        arrays: its stored arrays, by name.
        channels: of the teacher; a codec whose arrays have another number of them is refused.

    Raises:
        UnsupportedFormatError: for names that this version does not know.
        StoreError: for parameters and arrays that no codec has.
    """
    refuse_unknown(data)
    # One NaN in a basis would make every feature of every image NaN.
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise StoreError(f"codec {codec_label(data)}: the array '{name}' holds values that are not finite")
    try:
        codec = CODECS[codec_label(data)].from_json(data, arrays)
    except (KeyError, TypeError, ValueError, OverflowError) as exc:
        # Parameters of any JSON type reach `from_json` from a damaged cache.
        raise StoreError(f"codec {codec_label(data)}: impossible parameters ({exc!r:.100})") from exc
    # Codes would decode with the arrays of another teacher, too, to features of another width.
    per_channel = {"mean", "scale"} & codec.arrays().keys()
    if channels is not None and any(codec.arrays()[name].shape != (channels,) for name in per_channel):
        raise StoreError(f"codec {codec_label(data)}: its arrays are not those of a teacher with {channels} channels")
    return codec


def refuse_unknown(data: dict[str, Any], document: str | None = None) -> None:
    """Raise UnsupportedFormatError for a codec that this version does not have.

    Args:
        data: the codec's stored JSON.
        document: path or URL of the document with it, for the message.
    """
    name = codec_label(data)
    if name not in CODECS:
        raise UnsupportedFormatError(
            f"{f'{document}: ' if document else ''}codec '{name:.40}' is unknown (known: {', '.join(CODECS)}): "
            "install the radio-cache that wrote the cache"
        )


def codec_label(data: dict[str, Any]) -> str:
    """Return the key in `CODECS` of a codec's stored JSON: "half", "klt/zstd"."""
    return "/".join(str(data[key]) for key in ("name", "packing") if key in data)


def label_of(codec: Codec) -> str:
    """Return a codec's key in `CODECS`."""
    return codec_label(codec.to_json())
