"""The documents of a cache of format version 1, as a pure function of its meta and its specs.

The writer stores them, the reader refuses arrays with other documents, `verify` compares and `repair` restores them.
"""

import json
from collections.abc import Iterator

import numpy as np

from radio_cache.codecs import Codec
from radio_cache.format.pixels import pixels_document
from radio_cache.format.schema import ATTRIBUTES_KEY, TRANSFORM, CacheMeta, TeacherSpec
from radio_cache.format.zarr_json import DOCUMENT, group_document, plain_array_document, sharded_array_document

INDEX_CHUNK = 1 << 20
"""Rows of the image index in one chunk: it is written once, as a whole."""

INDEX_DTYPES = {"key_ends": "uint64", "label": "int32", "container": "int32", "offset": "int64", "length": "int64"}
"""The columns of the image index that have a row per image; `key_bytes` has as many as the keys are long."""

Documents = Iterator[tuple[str, bytes]]
"""(path below the group, content)."""


def root_document(meta: CacheMeta) -> bytes:
    """Return the document that makes a folder a cache."""
    return group_document({ATTRIBUTES_KEY: meta.to_json()})


def images_documents(meta: CacheMeta) -> Documents:
    """Yield the documents of the images' group, except those of the index."""
    yield DOCUMENT, group_document()
    for name, (dtype, row) in IMAGES_COLUMNS.items():
        # A chunk is a shard, so that two builders never write the same file.
        shape, chunks = (meta.num_images, *row), (meta.shard_images, *row)
        yield (
            f"{name}/{DOCUMENT}",
            plain_array_document(shape, chunks, dtype, 0, ("image", *_COLUMN_AXES.get(name, ()))),
        )
    if meta.pixels is not None:
        document = pixels_document(meta.num_images, meta.shard_images)
        yield f"{PIXELS}/{DOCUMENT}", json.dumps(document, indent=2).encode()


PIXELS = "pixels"
"""The array of the images themselves, below their group."""

IMAGES_COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "status": ("uint8", ()),
    "size_hw": ("int32", (2,)),
    "digest": ("uint8", (16,)),
}
"""Name -> type and shape of an image's entry."""

_COLUMN_AXES = {"size_hw": ("height_width",), "digest": ("digest_byte",)}

_TRANSFORM_AXES = {
    "mean": ("channel",),
    "scale": ("channel",),
    "basis": ("channel", "component"),
    "eigenvalues": ("component",),
    "widths": ("component",),
    "scales": ("component",),
    "levels": ("level",),
    "channel_scales": ("component",),
    "frequency_scales": ("row_frequency", "column_frequency"),
    "frequencies": ("table", "symbol"),
    "thresholds": ("table", "threshold"),
}
"""Array that a codec decodes with -> names of its axes; arrays of other names have numbered axes."""


def index_documents(num_images: int, num_key_bytes: int) -> Documents:
    """Yield the documents of an image index."""
    yield DOCUMENT, group_document()
    yield f"key_bytes/{DOCUMENT}", index_document("uint8", num_key_bytes, "key_byte")
    for name, dtype in INDEX_DTYPES.items():
        yield f"{name}/{DOCUMENT}", index_document(dtype, num_images)


def index_document(dtype: str, length: int, axis: str = "image") -> bytes:
    """Return the document of one column of an image index."""
    # Zarr requires chunks of at least one element, also for an empty array.
    return plain_array_document((length,), (max(1, min(length, INDEX_CHUNK)),), dtype, 0, (axis,))


def teacher_documents(meta: CacheMeta, spec: TeacherSpec, codec: Codec) -> Documents:
    """Yield the documents of a teacher's group."""
    yield DOCUMENT, group_document({ATTRIBUTES_KEY: spec.to_json()})
    yield f"spatial/{DOCUMENT}", spatial_document(meta, spec, codec)
    if codec.arrays():
        yield f"{TRANSFORM}/{DOCUMENT}", group_document()
    for name, array in codec.arrays().items():
        axes = _TRANSFORM_AXES.get(name, tuple(f"axis_{number}" for number in range(array.ndim)))
        # One chunk each: a codec needs its arrays whole.
        yield f"{TRANSFORM}/{name}/{DOCUMENT}", plain_array_document(array.shape, array.shape, array.dtype, 0, axes)
    if spec.summary_dim is not None:
        yield f"summary/{DOCUMENT}", summary_document(meta, spec)
    if spec.view_sampling is not None:
        yield f"crop_xyxy/{DOCUMENT}", crop_document(meta, spec)
        yield f"flipped/{DOCUMENT}", flipped_document(meta, spec)
    yield f"stats/{DOCUMENT}", group_document()
    for name, width in stats_widths(spec).items():
        yield f"stats/{name}/{DOCUMENT}", stats_document(meta, width, name)


def spatial_document(meta: CacheMeta, spec: TeacherSpec, codec: Codec) -> bytes:
    """Return the document of a teacher's maps."""
    # (views, n, *row). A file holds a shard of one view, and an inner chunk one row, so that rows are read one by one.
    row = codec.row_shape(spec.geometry.grid_hw, spec.spatial_dim)
    return sharded_array_document(
        (spec.views, meta.num_images, *row),
        (1, meta.shard_images, *row),
        (1, 1, *row),
        codec.dtype,
        codec.fill_value,
        codec.zstd_level,
        ("view", "image", *codec.row_axes),
    )


def summary_document(meta: CacheMeta, spec: TeacherSpec) -> bytes:
    """Return the document of a teacher's summaries."""
    # (views, n, c). NaN marks rows that were never written, since no valid summary holds one.
    width = spec.summary_dim or 0
    return plain_array_document(
        (spec.views, meta.num_images, width),
        (1, meta.shard_images, width),
        "float16",
        np.nan,
        ("view", "image", "summary_channel"),
    )


def crop_document(meta: CacheMeta, spec: TeacherSpec) -> bytes:
    """Return the document of the boxes of a teacher's views. A chunk has all views of a shard."""
    # (views, n, xyxy) in whole pixels
    return plain_array_document(
        (spec.views, meta.num_images, 4), (spec.views, meta.shard_images, 4), "int32", 0, ("view", "image", "xyxy")
    )


def flipped_document(meta: CacheMeta, spec: TeacherSpec) -> bytes:
    """Return the document of the array that marks mirrored views."""
    return plain_array_document(
        (spec.views, meta.num_images), (spec.views, meta.shard_images), "uint8", 0, ("view", "image")
    )


def stats_document(meta: CacheMeta, width: int, name: str = "spatial") -> bytes:
    """Return the document of the statistics of maps ("spatial") or summaries ("summary")."""
    # (shards, 2, c): sums and sums of squares, in float64 because they run over millions of tokens.
    axes = ("shard", "power_sum", f"{name}_channel")
    return plain_array_document((meta.num_shards, 2, width), (1, 2, width), "float64", np.nan, axes)


def stats_widths(spec: TeacherSpec) -> dict[str, int]:
    """Return the names of a teacher's statistics, with their numbers of channels."""
    widths = {"spatial": spec.spatial_dim}
    return widths if spec.summary_dim is None else {**widths, "summary": spec.summary_dim}


def grows_along(path: str) -> int | None:
    """Return the axis along which an array grows with the cache; None for arrays that do not grow.

    Args:
        path: of the array's document, below the unit's group.
    """
    head = path.split("/")[0]
    if head in ("spatial", "summary", "crop_xyxy", "flipped"):
        return 1
    # A path without a slash is a group's own document, which has no shape.
    return 0 if head in (*IMAGES_COLUMNS, PIXELS, "stats") and path.count("/") else None


__all__ = [
    "IMAGES_COLUMNS",
    "INDEX_CHUNK",
    "INDEX_DTYPES",
    "PIXELS",
    "crop_document",
    "flipped_document",
    "grows_along",
    "images_documents",
    "index_document",
    "index_documents",
    "root_document",
    "spatial_document",
    "stats_document",
    "stats_widths",
    "summary_document",
    "teacher_documents",
]
