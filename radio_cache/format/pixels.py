"""Images stored in a cache: format, size, and the document of their array."""

from dataclasses import dataclass
from typing import Any, Literal

from radio_cache.errors import ConfigError
from radio_cache.format.zarr_json import VARIABLE_BYTES

PixelFormat = Literal["jpeg", "webp-lossless"]


MAX_SIDE_PX = 1 << 16


@dataclass(frozen=True, kw_only=True)
class PixelStore:
    """The format of stored images.

    Attributes:
        side_px: longest accepted shorter side.
        format: name of the image format.
        quality: of JPEG, 1 to 100; 0 for lossless.
    """

    side_px: int
    format: PixelFormat
    quality: int

    def __post_init__(self) -> None:
        if not 1 <= self.side_px <= MAX_SIDE_PX:
            raise ConfigError(f"--store-pixels {self.side_px}: a shorter side of 1 to {MAX_SIDE_PX} pixels")
        if not (1 <= self.quality <= 100 if self.format == "jpeg" else self.quality == 0):
            raise ConfigError(f"pixels as {self.format} have no quality {self.quality}")

    def __str__(self) -> str:
        return f"{self.side_px} as {self.format}" + (f" of quality {self.quality}" if self.quality else "")


def pixels_document(num_images: int, shard_images: int) -> dict[str, Any]:
    """Return the `zarr.json` of the array."""
    crc: dict[str, Any] = {"name": "crc32c"}
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            # One image, so that each can be read without its neighbours.
            "chunk_shape": [1],
            "codecs": [{"name": "vlen-bytes", "configuration": {}}, crc],
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, crc],
            "index_location": "end",
        },
    }
    return {
        "shape": [num_images],
        "data_type": VARIABLE_BYTES,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_images]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "",
        "codecs": [sharding],
        "attributes": {},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
        "dimension_names": ["image"],
    }
