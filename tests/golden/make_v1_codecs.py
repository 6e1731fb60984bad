"""Made the golden caches of the calibrated codecs: `python tests/golden/make_v1_codecs.py FOLDER`.

Never write over the committed ones: `v1-codecs.zarr`, `v1-gains.zarr` with the layouts that klt under zstd has had since
it has gains, and `v1-ans.zarr`. Three images in shards of two; row 1 is unusable; teachers of 16 channels. Codes are chosen
by formula, not by encoding, and everything they are multiplied with is a sum of few powers of two, so that float32 decodes
them without rounding, in any order of sums, on any machine. The cosines of `v1-ans.zarr` are the exception.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from radio_cache.codecs import Codec, Int8, KltAns, KltPacked, KltZstd
from radio_cache.codecs.klt_basis import KltBasis
from radio_cache.codecs.klt_zstd import LARGEST
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.schema import (
    IMAGENET_PIXELS,
    CacheMeta,
    Container,
    Failure,
    TeacherSpec,
)
from radio_cache.geometry.crops import ViewGeometry
from radio_cache.statistics.fidelity import Fidelity
from radio_cache.statistics.hadamard import hadamard
from radio_cache.testing import write_images_shard, write_teacher_shard
from radio_cache.writer import ImageIndex, add_teacher, create_cache

CACHES = {
    "v1-codecs.zarr": ("golden-int8", "golden-packed", "golden-zstd"),
    "v1-gains.zarr": ("golden-bytes", "golden-nibbles"),
    "v1-ans.zarr": ("golden-ans",),
}
KEYS = ("cat/1.jpg", "cat/broken.jpg", "dog/1.jpg")
UNUSABLE = Failure(row=1, reason="the file is empty (0 bytes)")
GRID_HW, CHANNELS = (2, 3), 16
META = CacheMeta(
    num_images=3,
    shard_images=2,
    creator="radio-cache 0.1.0",
    class_names=("cat", "dog"),
    max_pixels=89_478_485,
    containers=(Container(kind="folder", path="photos", prefix=""),),
)
FIDELITY = Fidelity(num_tokens=6, cosine=0.99, cosine_worst=0.98, squared_error=0.25, variance=16.0)
ASKED = {"name": "klt", "packing": "packed", "fidelity": 0.99}
CALIBRATION = {
    "images": 64,
    "tokens": 384,
    "seed": 0,
    "num_tokens": 76,
    "cosine": 0.9905,
    "cosine_worst": 0.98,
    "squared_error": 0.25,
    "variance": 16.0,
}
CONVERTED = {
    "source": "klt/packed",
    "fidelity": {"num_tokens": 12, "cosine": 0.9925, "cosine_worst": 0.9, "squared_error": 0.125, "variance": 0.0},
}

BASIS = KltBasis(
    mean=(np.arange(CHANNELS) / 8 - 1).astype(np.float32),
    basis=hadamard(CHANNELS).astype(np.float32),
    eigenvalues=np.array([4, 3, 2, 1] + [0.5] * 12, np.float32),  # their mean is 1, and so is phi
)
WIDTHS = np.array([10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2, 0, 3, 4], np.uint8)


def levels() -> np.ndarray:
    """Tables of 2, 4 ... 1024 levels: odd multiples of 2^-width between -1 and 1."""
    return np.concatenate([(2 * np.arange(2**b) + 1) / 2**b - 1 for b in range(1, 11)]).astype(np.float32)


def codecs() -> dict[str, Codec]:
    return {
        "golden-int8": Int8(np.ldexp(np.ones(CHANNELS, np.float32), -np.arange(CHANNELS) // 2)),
        "golden-packed": KltPacked(
            BASIS, WIDTHS, np.ldexp(np.ones(CHANNELS, np.float32), np.arange(CHANNELS) % 3), levels()
        ),
        "golden-zstd": KltZstd(BASIS, 0.375, "planes"),
        "golden-bytes": KltZstd(BASIS, 0.375, "bytes"),
        "golden-nibbles": KltZstd(BASIS, 0.375, "nibbles"),
        "golden-ans": ans(),
    }


def ans() -> KltAns:
    """Four classes: tables of 2, 4, 8 and 16 likely symbols, and the same table of 8 for gains."""
    frequencies = np.zeros((5, 256), np.uint16)
    for table, symbols in enumerate((2, 4, 8, 16, 8)):
        frequencies[table, :symbols] = 4096 // symbols
        frequencies[table, 0] -= 1
        frequencies[table, 255] = 1
    return KltAns(
        BASIS,
        step=0.375,
        shrink=(0.125, 0.0625),
        channel_scales=np.arange(CHANNELS, dtype=np.int16) - 4,
        frequency_scales=np.array([[8, 4, 0], [2, 0, -9]], np.int16),
        frequencies=frequencies,
        thresholds=np.full((4, 2), 0.5, np.float32),
    )


def told(name: str) -> dict[str, Any]:
    """What the codec's JSON says beside its parameters."""
    if name == "golden-packed":
        return {"asked": ASKED, "calibration": CALIBRATION}
    return {"converted": CONVERTED} if name == "golden-zstd" else {}


def integers(row: int, largest: int) -> np.ndarray:
    """(h, w, c): whole numbers of all sizes that zstd codes have."""
    i, j, c = np.meshgrid(np.arange(2), np.arange(3), np.arange(CHANNELS), indexing="ij")
    small = (7 * row + 5 * i + 3 * j + 11 * c) % 31 - 15
    small[0, 0, :4] = (127, -128, 128 + row, -300)
    small[1, 2, :2] = (largest, -largest)
    return small.astype(np.int32)


def zstd_gains(row: int) -> np.ndarray:
    """(h, w): whole octaves."""
    i, j = np.meshgrid(np.arange(2), np.arange(3), indexing="ij")
    return (4 * ((row + 2 * i + j) % 5 - 2)).astype(np.int8)


def gains(row: int) -> np.ndarray:
    """(h, w, groups): even steps from 1, which are powers of two."""
    i, j, g = np.meshgrid(np.arange(2), np.arange(3), np.arange(4), indexing="ij")
    return (63 + 2 * ((row + i + 2 * j + g) % 5 - 2)).astype(np.int32)


def numbers(row: int) -> np.ndarray:
    """(h, w, c): which level, for each channel's width."""
    i, j, c = np.meshgrid(np.arange(2), np.arange(3), np.arange(CHANNELS), indexing="ij")
    return ((389 * row + 101 * i + 211 * j + 37 * c) % 2 ** WIDTHS.astype(np.int64)).astype(np.int32)


def int8_codes(row: int) -> np.ndarray:
    """(h, w, c + 1): codes, and an exponent up to 2."""
    i, j, c = np.meshgrid(np.arange(2), np.arange(3), np.arange(CHANNELS + 1), indexing="ij")
    codes = (53 * row + 17 * i + 29 * j + 71 * c) % 255 - 127
    codes[..., -1] = ((row + i + j) % 3)[..., 0]
    return codes.astype(np.int8)


def codes(name: str, row: int) -> np.ndarray:
    """As stored."""
    codec = codecs()[name]
    if isinstance(codec, KltPacked):
        return codec.pack(gains(row), numbers(row))
    if isinstance(codec, KltAns):
        return codec.pack(
            zstd_gains(row).astype(np.int16), np.clip(integers(row, 32_767), -32_766, 32_766).astype(np.int16)
        )
    if isinstance(codec, KltZstd):
        return codec.rows_of(zstd_gains(row), integers(row, LARGEST[codec.layout]))
    return int8_codes(row)


def spec(name: str, codec: Codec) -> TeacherSpec:
    return TeacherSpec(
        name=name,
        family="golden",
        model="arithmetic",
        licence="CC0-1.0",
        weights="none",
        weights_sha256="0" * 64,
        geometry=ViewGeometry(
            fit="pad",
            input_hw=(32, 48),
            resize_px=48,
            interpolation="bilinear",
            grid_hw=GRID_HW,
            stride_px=16.0,
            offset_px=8.0,
        ),
        normalisation=IMAGENET_PIXELS,
        summary_dim=2,
        spatial_dim=CHANNELS,
        summary_note="row, row / 2",
        spatial_note="by formula",
        compute_dtype="bfloat16",
        codec=CodecRecord.from_json(codec.to_json() | told(name)),
        views=1,
        software={"numpy": "2"},
    )


def make(path: Path) -> None:
    """One of `CACHES`, by the name of its folder."""
    nowhere = np.full(len(KEYS), -1, np.int64)
    create_cache(path, META, ImageIndex(KEYS, np.array([0, 0, 1], np.int32), np.zeros(3, np.int32), nowhere, nowhere))
    for shard in range(META.num_shards):
        write_images(path, shard)
    for name in CACHES[path.name]:
        codec = codecs()[name]
        add_teacher(path, META, spec(name, codec), codec)
        for shard in range(META.num_shards):
            write_teacher(path, name, codec, shard)


def write_images(path: Path, shard: int) -> None:
    sizes_hw = {row: (100 + row, 150 + row) for row in range(META.num_images) if row != UNUSABLE.row}
    write_images_shard(
        path, META, shard, sizes_hw, {row: bytes([row] * 16) for row in range(META.num_images)}, [UNUSABLE]
    )


def write_teacher(path: Path, name: str, codec: Codec, shard: int) -> None:
    stored = {row: codes(name, row) for row in META.shard_rows(shard) if row != UNUSABLE.row}
    features = {row: (np.array([row, row / 2]), codec.decode(code[None])[0]) for row, code in stored.items()}
    fidelity = replace(FIDELITY, num_tokens=len(stored) * math.prod(GRID_HW))
    write_teacher_shard(
        path, META, shard, spec(name, codec), codec, features, codes=stored, failures=[UNUSABLE], fidelity=fidelity
    )


if __name__ == "__main__":
    for cache in CACHES:
        make(Path(sys.argv[1]) / cache)
