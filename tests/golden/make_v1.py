"""Made `v1.zarr`, the golden cache of format version 1: `python tests/golden/make_v1.py FOLDER`.

Never write over the committed one: it is there to show that caches made by older releases are still read. Five images
in shards of two, from a folder and a tar; row 3 is unusable; teacher golden-b stopped before its last shard. Numbers
are chosen to be exact in half precision: see `map_value` and `summary_value`.
"""

import sys
from pathlib import Path

import numpy as np

from radio_cache.codecs import Half
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.schema import (
    IMAGENET_PIXELS,
    CacheMeta,
    Container,
    Failure,
    TeacherSpec,
)
from radio_cache.geometry.crops import ViewGeometry
from radio_cache.testing import write_images_shard, write_teacher_shard
from radio_cache.writer import ImageIndex, add_teacher, create_cache

KEYS = (
    "photos/cat/Mädchen mit Katze.jpg",
    "photos/cat/2.png",
    "photos/dog/1.jpg",
    "train-000.tar/broken.jpg",
    "train-000.tar/0001.jpg",
)
UNUSABLE = Failure(row=3, reason="the file is empty (0 bytes)")
GRID_HW = (2, 3)
META = CacheMeta(
    num_images=5,
    shard_images=2,
    creator="radio-cache 0.1.0",
    class_names=("cat", "dog"),
    max_pixels=89_478_485,
    containers=(
        Container(kind="folder", path="photos", prefix="photos/"),
        Container(kind="tar", path="train-000.tar", prefix="train-000.tar/"),
    ),
)


def map_value(row: int, i: int, j: int, channel: int) -> float:
    """Token (i, j) of an image's map."""
    return row + i / 4 + j / 16 + channel / 64


def map_of(row: int, width: int) -> np.ndarray:
    """(h, w, width)."""
    return np.fromfunction(lambda i, j, c: map_value(row, i, j, c), (*GRID_HW, width))


def summary_value(row: int, channel: int) -> float:
    """One channel of an image's summary."""
    return 10 * row - channel / 8


def spec(name: str, *, summary_dim: int | None, spatial_dim: int) -> TeacherSpec:
    return TeacherSpec(
        name=name,
        family="golden",
        model="arithmetic",
        licence="CC0-1.0",
        weights="none",
        weights_sha256="0" * 64,
        geometry=ViewGeometry(
            fit="crop",
            input_hw=(32, 48),
            resize_px=40,
            interpolation="bicubic",
            grid_hw=GRID_HW,
            stride_px=16.0,
            offset_px=8.0,
        ),
        normalisation=IMAGENET_PIXELS,
        summary_dim=summary_dim,
        spatial_dim=spatial_dim,
        summary_note="10 * row - channel / 8",
        spatial_note="row + i / 4 + j / 16 + channel / 64",
        compute_dtype="float32",
        codec=CodecRecord(parameters={"name": "half"}),
        views=1,
        software={"numpy": "2"},
    )


def make(path: Path) -> None:
    none = np.array([-1] * 5, np.int64)
    index = ImageIndex(
        KEYS,
        labels=np.array([0, 0, 1, -1, 1], np.int32),
        container=np.array([0, 0, 0, 1, 1], np.int32),
        offset=np.where([0, 0, 0, 1, 1], [0, 0, 0, 512, 1536], none),
        length=np.where([0, 0, 0, 1, 1], [0, 0, 0, 0, 700], none),
    )
    create_cache(path, META, index)
    for shard in range(META.num_shards):
        write_images(path, shard)
    a, b = spec("golden-a", summary_dim=4, spatial_dim=3), spec("golden-b", summary_dim=None, spatial_dim=1)
    for teacher in (a, b):
        add_teacher(path, META, teacher)
    for shard in range(META.num_shards):
        write_teacher(path, a, shard)
    for shard in range(META.num_shards - 1):
        write_teacher(path, b, shard)


def write_images(path: Path, shard: int) -> None:
    sizes_hw = {row: (100 + row, 200 + row) for row in range(META.num_images) if row != UNUSABLE.row}
    write_images_shard(
        path, META, shard, sizes_hw, {row: bytes([row] * 16) for row in range(META.num_images)}, [UNUSABLE]
    )


def write_teacher(path: Path, teacher: TeacherSpec, shard: int) -> None:
    channels = range(teacher.summary_dim or 0)
    features = {
        row: (np.array([summary_value(row, c) for c in channels]), map_of(row, teacher.spatial_dim))
        for row in META.shard_rows(shard)
        if row != UNUSABLE.row
    }
    write_teacher_shard(path, META, shard, teacher, Half(), features, failures=[UNUSABLE])


if __name__ == "__main__":
    make(Path(sys.argv[1]) / "v1-labelled.zarr")
