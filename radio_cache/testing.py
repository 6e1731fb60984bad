"""Fakes for tests, ours and yours: small real caches that need no weights, no network and no images on disk but their own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from radio_cache.codecs import Codec, Half
from radio_cache.codecs.base import CalibrationMaps
from radio_cache.codecs.calibrate import CodecRequest, calibrate
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.schema import (
    IMAGENET_PIXELS,
    IMAGES_UNIT,
    CacheMeta,
    Container,
    Failure,
    ImageStatus,
    TeacherSpec,
)
from radio_cache.geometry.crops import Fit, ViewGeometry, patch_geometry
from radio_cache.images.decode import decode_image
from radio_cache.reader import Cache, digest
from radio_cache.statistics.fidelity import Fidelity
from radio_cache.statistics.moments import Moments
from radio_cache.writer import ImageIndex, ShardWriter, add_teacher, create_cache

FakeTeachers = Mapping[str, tuple[int | None, int]]
"""Teacher name -> (summary width or None, spatial width)."""

Features = tuple[NDArray[Any] | None, NDArray[Any]]
"""Of one image: summary (c,) or None, and map (h, w, c)."""


def write_images(
    root: Path, *, classes: Sequence[str] = ("blue", "red"), per_class: int = 4, size: int = 48, seed: int = 0
) -> list[str]:
    """Small PNG photographs of noise around one colour per class, `root/<class>/<n>.png`; returns their keys, sorted."""
    rng = np.random.default_rng(seed)
    keys: list[str] = []
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        # A generator of its own, so that `seed` changes the noise and not the colours of the classes.
        colour = np.random.default_rng((7, number)).integers(40, 216, 3)
        for image in range(per_class):
            pixels = np.clip(colour + rng.normal(0, 25, (size, size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{image}.png")
            keys.append(f"{name}/{image}.png")
    return sorted(keys)


def fake_spec(
    name: str, *, summary_dim: int | None, spatial_dim: int, size: int = 32, patch: int = 8, fit: Fit = "squash"
) -> TeacherSpec:
    """Return the spec of a fake teacher: square patches, `half` codec. A name such as "fake@64" makes a level."""
    # A spec refuses a level whose name does not end with its input size.
    level_of = name.partition("@")[0] if "@" in name else None
    return TeacherSpec(
        name=name,
        family="fake",
        model="colours",
        licence="CC0-1.0",
        weights="none",
        weights_sha256="0" * 64,
        geometry=patch_geometry(size, patch, fit=fit, interpolation="bilinear"),
        normalisation=IMAGENET_PIXELS,
        summary_dim=summary_dim,
        spatial_dim=spatial_dim,
        summary_note="mean colour",
        spatial_note="colour of the patch",
        compute_dtype="float32",
        codec=CodecRecord(parameters=Half().to_json()),
        views=1,
        software={},
        level_of=level_of,
    )


def fake_features(
    image: Image.Image, spec: TeacherSpec, seed: int = 0
) -> tuple[NDArray[np.float32] | None, NDArray[np.float32]]:
    """Features that mean something: fixed random projections of each patch's mean colour, and of the image's.

    Returns summary (c,) or None, and spatial (h, w, c).
    """
    h, w = spec.geometry.grid_hw
    # (h, w, 3) mean colour of each patch, around 0
    grid = np.asarray(image.resize((w, h), Image.Resampling.BOX), np.float64) / 255 - 0.5
    # Seeded by the width, so that two sizes of a teacher project in the same way.
    rng = np.random.default_rng((seed, spec.spatial_dim))
    # (h, w, 3) @ (3, c) -> (h, w, c)
    spatial = grid @ rng.normal(size=(3, spec.spatial_dim)) * 4
    summary = None
    if spec.summary_dim is not None:
        summary = (grid.mean(axis=(0, 1)) @ rng.normal(size=(3, spec.summary_dim)) * 4).astype(np.float32)
    return summary, spatial.astype(np.float32)


def make_tiny_cache(
    path: Path,
    images: Path,
    *,
    teachers: FakeTeachers | None = None,
    shard_images: int = 4,
    unusable: Sequence[str] = (),
    codecs: Mapping[str, CodecRequest] | None = None,
    geometries: Mapping[str, ViewGeometry] | None = None,
) -> Cache:
    """Create a complete cache of a folder of class folders, with fake teachers, in the real format.

    Args:
        path: of the cache.
        images: folder of class folders.
        shard_images: images of a shard.
        teachers: name -> (summary width or None, map width), {"fake-a": (6, 8), "fake-b": (None, 5)} by default. "fake-a@64"
            is a level of 64 pixels of "fake-a", which has 32.
        unusable: keys to mark as unusable images.
        codecs: teacher name -> its codec, calibrated on all usable images; `half` by default.
        geometries: teacher name -> its geometry; squashed to its size by default.
    """
    keys = sorted(file.relative_to(images).as_posix() for file in images.rglob("*.*"))
    class_names = tuple(sorted({key.split("/")[0] for key in keys}))
    count = len(keys)
    meta = CacheMeta(
        num_images=count,
        shard_images=shard_images,
        creator="radio-cache tests",
        class_names=class_names,
        max_pixels=10**6,
        containers=(Container(kind="folder", path=str(images.resolve()), prefix=""),),
    )
    labels = np.array([class_names.index(key.split("/")[0]) for key in keys], np.int32)
    no_offset = np.full(count, -1, np.int64)
    create_cache(path, meta, ImageIndex(keys, labels, np.zeros(count, np.int32), no_offset, no_offset))
    loaded = [decode_image((images / key).read_bytes()) for key in keys]
    failures = [Failure(row=row, reason="marked unusable") for row in range(count) if keys[row] in unusable]
    sizes_hw = {row: (loaded[row].height, loaded[row].width) for row in range(count) if keys[row] not in unusable}
    digests = {row: digest((images / keys[row]).read_bytes()) for row in range(count)}
    for shard in range(meta.num_shards):
        write_images_shard(path, meta, shard, sizes_hw, digests, failures)
    for name, (summary_dim, spatial_dim) in (teachers or {"fake-a": (6, 8), "fake-b": (None, 5)}).items():
        # The name of a level ends with its size.
        size = int(name.partition("@")[2] or 32)
        spec = fake_spec(name, summary_dim=summary_dim, spatial_dim=spatial_dim, size=size)
        spec = replace(spec, geometry=(geometries or {}).get(name, spec.geometry))
        features = {row: fake_features(loaded[row], spec) for row in sizes_hw}
        codec = _fitted((codecs or {}).get(name, CodecRequest(name="half")), spec, features)
        spec = replace(spec, codec=CodecRecord(parameters=codec.to_json()))
        add_teacher(path, meta, spec, codec)
        for shard in range(meta.num_shards):
            write_teacher_shard(path, meta, shard, spec, codec, features, failures=failures)
    return Cache(path)


def _fitted(request: CodecRequest, spec: TeacherSpec, features: Mapping[int, Features]) -> Codec:
    # (images, h, w, c) -> (tokens, c)
    tokens = np.concatenate([spatial for _, spatial in features.values()]).reshape(-1, spec.spatial_dim)
    maps = np.stack([spatial for _, spatial in features.values()])
    sample = CalibrationMaps(fitted=maps, held_out=maps, valid=np.ones(maps.shape[:3], np.bool_))
    return calibrate(request, Moments.of(tokens), tokens, tokens, maps=sample).codec


def write_images_shard(
    path: Path,
    meta: CacheMeta,
    shard: int,
    sizes_hw: Mapping[int, tuple[int, int]],
    digests: Mapping[int, bytes],
    failures: Sequence[Failure] = (),
) -> None:
    """Write the records of a shard's images. `sizes_hw` and `digests` are by row; absent rows get 0."""
    rows = meta.shard_rows(shard)
    unusable = tuple(failure for failure in failures if failure.row in rows)
    # Chunks are stored in full size, also for a short last shard.
    status, size_hw = np.zeros(meta.shard_images, np.uint8), np.zeros((meta.shard_images, 2), np.int32)
    digest = np.zeros((meta.shard_images, 16), np.uint8)
    for place, row in enumerate(rows):
        bad = row in {failure.row for failure in unusable}
        status[place] = ImageStatus.UNUSABLE if bad else ImageStatus.OK
        size_hw[place] = sizes_hw.get(row, (0, 0))
        digest[place] = np.frombuffer(digests.get(row, bytes(16)), np.uint8)
    writer = ShardWriter(path, IMAGES_UNIT, shard)
    writer.write_plain("status", status, grid=(shard,))
    writer.write_plain("size_hw", size_hw, grid=(shard, 0))
    writer.write_plain("digest", digest, grid=(shard, 0))
    writer.commit({"first_row": rows[0], "num_rows": len(rows), "num_tokens": 0, "failures": unusable})


def write_teacher_shard(
    path: Path,
    meta: CacheMeta,
    shard: int,
    spec: TeacherSpec,
    codec: Codec,
    features: Mapping[int, Features],
    *,
    codes: Mapping[int, NDArray[Any]] | None = None,
    failures: Sequence[Failure] = (),
    fidelity: Fidelity | None = None,
) -> None:
    """Write a shard of a teacher. Rows absent from `features` are holes. `codes` replace those that the codec computes."""
    rows = meta.shard_rows(shard)
    written = {row: features[row] for row in rows if row in features}
    codes = codes or {row: codec.encode(spatial.astype(np.float32)) for row, (_, spatial) in written.items()}
    writer = ShardWriter(path, spec.name, shard)
    # Along the axes of a row there is one chunk.
    rest = (0,) * len(codec.row_shape(spec.geometry.grid_hw, spec.spatial_dim))
    writer.write_sharded(
        "spatial",
        [codes.get(row) for row in rows],
        grid=(0, shard, *rest),
        chunks_per_shard=meta.shard_images,
        zstd_level=codec.zstd_level,
    )
    tokens = np.concatenate([spatial.reshape(-1, spec.spatial_dim) for _, spatial in written.values()]).astype(
        np.float64
    )
    writer.write_plain("stats/spatial", _sums(tokens), grid=(shard, 0, 0))
    if spec.summary_dim is not None:
        # NaN is the fill value, which marks rows without a summary.
        chunk = np.full((1, meta.shard_images, spec.summary_dim), np.nan, np.float16)
        for row, (summary, _) in written.items():
            if summary is not None:
                chunk[0, row - rows[0]] = summary
        writer.write_plain("summary", chunk, grid=(0, shard, 0))
        summaries = chunk[0][~np.isnan(chunk[0]).any(axis=1)].astype(np.float64)
        writer.write_plain("stats/summary", _sums(summaries), grid=(shard, 0, 0))
    fields = {"first_row": rows[0], "num_rows": len(rows), "num_tokens": len(tokens), "fidelity": fidelity}
    writer.commit(fields | {"failures": tuple(failure for failure in failures if failure.row in rows)})


def _sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return statistics as they are stored: sums of values and of their squares, by channel."""
    # (tokens, c) -> (1, 2, c), the chunk of one shard
    return np.stack([values.sum(axis=0), np.square(values).sum(axis=0)])[None]


__all__ = [
    "FakeTeachers",
    "Features",
    "fake_features",
    "fake_spec",
    "make_tiny_cache",
    "write_images",
    "write_images_shard",
    "write_teacher_shard",
]
