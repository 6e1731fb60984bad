"""Fakes for tests, ours and yours: small real caches that need no weights, no network and no images on disk but their own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from radio_cache.codecs import Codec, Half
from radio_cache.codecs.calibrate import CodecRequest, calibrate
from radio_cache.crops import Fit, patch_geometry
from radio_cache.moments import Moments
from radio_cache.reader import Cache, digest
from radio_cache.schema import IMAGENET_PIXELS, IMAGES_UNIT, CacheMeta, Container, Failure, ImageStatus, TeacherSpec
from radio_cache.writer import ImageIndex, ShardWriter, add_teacher, create_cache

FakeTeachers = Mapping[str, tuple[int | None, int]]
"""Teacher name -> (summary width or None, spatial width)."""


def write_images(
    root: Path, *, classes: Sequence[str] = ("blue", "red"), per_class: int = 4, size: int = 48, seed: int = 0
) -> list[str]:
    """Small PNG photographs of noise around one colour per class, `root/<class>/<n>.png`; returns their keys, sorted."""
    rng = np.random.default_rng(seed)
    keys: list[str] = []
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        colour = np.random.default_rng((7, number)).integers(40, 216, 3)
        for image in range(per_class):
            pixels = np.clip(colour + rng.normal(0, 25, (size, size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{image}.png")
            keys.append(f"{name}/{image}.png")
    return sorted(keys)


def fake_spec(
    name: str, *, summary_dim: int | None, spatial_dim: int, size: int = 32, patch: int = 8, fit: Fit = "squash"
) -> TeacherSpec:
    """The spec of a teacher that does not exist: square patches, `half` codec. A name such as "fake@64" is that of a level."""
    level_of = name.partition("@")[0] if "@" in name else None
    return TeacherSpec(
        name=name, family="fake", model="colours", licence="CC0-1.0", weights="none", weights_sha256="0" * 64,
        geometry=patch_geometry(size, patch, fit=fit, interpolation="bilinear"), normalisation=IMAGENET_PIXELS,
        summary_dim=summary_dim, spatial_dim=spatial_dim, summary_note="mean colour", spatial_note="colour of the patch",
        compute_dtype="float32", codec=Half().to_json(), views=1, software={}, level_of=level_of,
    )  # fmt: skip


def fake_features(
    image: Image.Image, spec: TeacherSpec, seed: int = 0
) -> tuple[NDArray[np.float32] | None, NDArray[np.float32]]:
    """Features that mean something: fixed random projections of each patch's mean colour, and of the image's.

    Returns summary (c,) or None, and spatial (h, w, c).
    """
    h, w = spec.geometry.grid_hw
    grid = np.asarray(image.resize((w, h), Image.Resampling.BOX), np.float64) / 255 - 0.5
    rng = np.random.default_rng((seed, spec.spatial_dim))
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
) -> Cache:
    """A complete cache over a folder of class folders, by fake teachers, in the real format.

    teachers: {"fake-a": (6, 8), "fake-b": (None, 5)} by default; "fake-a@64" is a level of 64 pixels of "fake-a", which
    has 32. unusable: keys to mark as images that cannot be used.
    codecs: teacher name -> its codec, calibrated on all usable images; `half` for teachers that are not named.
    """
    keys = sorted(file.relative_to(images).as_posix() for file in images.rglob("*.*"))
    class_names = tuple(sorted({key.split("/")[0] for key in keys}))
    count = len(keys)
    meta = CacheMeta(
        num_images=count, shard_images=shard_images, creator="radio-cache tests", class_names=class_names, max_pixels=10**6,
        containers=(Container(kind="folder", path=str(images.resolve()), prefix=""),),
    )  # fmt: skip
    labels = np.array([class_names.index(key.split("/")[0]) for key in keys], np.int32)
    no_offset = np.full(count, -1, np.int64)
    create_cache(path, meta, ImageIndex(keys, labels, np.zeros(count, np.int32), no_offset, no_offset))
    loaded = [Image.open(images / key).convert("RGB") for key in keys]
    for shard in range(meta.num_shards):
        _write_images_shard(path, meta, shard, keys, images, loaded, set(unusable))
    for name, (summary_dim, spatial_dim) in (teachers or {"fake-a": (6, 8), "fake-b": (None, 5)}).items():
        size = int(name.partition("@")[2] or 32)
        spec = fake_spec(name, summary_dim=summary_dim, spatial_dim=spatial_dim, size=size)
        usable = [None if key in unusable else image for key, image in zip(keys, loaded, strict=True)]
        codec = _fitted((codecs or {}).get(name, CodecRequest(name="half")), spec, usable)
        spec = replace(spec, codec=codec.to_json())
        add_teacher(path, meta, spec, codec)
        for shard in range(meta.num_shards):
            _write_teacher_shard(path, meta, shard, spec, codec, usable)
    return Cache(path)


def _fitted(request: CodecRequest, spec: TeacherSpec, images: Sequence[Image.Image | None]) -> Codec:
    maps = [fake_features(image, spec)[1] for image in images if image is not None]
    tokens = np.concatenate(maps).reshape(-1, spec.spatial_dim)
    return calibrate(request, Moments.of(tokens), tokens, tokens).codec


def _write_images_shard(
    path: Path,
    meta: CacheMeta,
    shard: int,
    keys: Sequence[str],
    folder: Path,
    loaded: Sequence[Image.Image],
    unusable: set[str],
) -> None:
    rows = meta.shard_rows(shard)
    status, size_hw = np.zeros(meta.shard_images, np.uint8), np.zeros((meta.shard_images, 2), np.int32)
    digests = np.zeros((meta.shard_images, 16), np.uint8)
    for number, row in enumerate(rows):
        bad = keys[row] in unusable
        status[number] = ImageStatus.UNUSABLE if bad else ImageStatus.OK
        size_hw[number] = (0, 0) if bad else (loaded[row].height, loaded[row].width)
        digests[number] = np.frombuffer(digest((folder / keys[row]).read_bytes()), np.uint8)
    writer = ShardWriter(path, IMAGES_UNIT, shard)
    writer.write_plain("status", status, grid=(shard,))
    writer.write_plain("size_hw", size_hw, grid=(shard, 0))
    writer.write_plain("digest", digests, grid=(shard, 0))
    failures = tuple(Failure(row=row, reason="marked unusable") for row in rows if keys[row] in unusable)
    _commit(writer, rows, 0, failures)


def _write_teacher_shard(
    path: Path, meta: CacheMeta, shard: int, spec: TeacherSpec, codec: Codec, images: Sequence[Image.Image | None]
) -> None:
    rows = meta.shard_rows(shard)
    writer = ShardWriter(path, spec.name, shard)
    made = [None if image is None else fake_features(image, spec) for image in (images[row] for row in rows)]
    codes = [None if features is None else codec.encode(features[1]) for features in made]
    rest = (0,) * len(codec.row_shape(spec.geometry.grid_hw, spec.spatial_dim))
    writer.write_sharded(
        "spatial", codes, grid=(0, shard, *rest), chunks_per_shard=meta.shard_images, zstd_level=codec.zstd_level
    )
    maps = (
        np.stack([features[1] for features in made if features is not None])
        .reshape(-1, spec.spatial_dim)
        .astype(np.float64)
    )
    writer.write_plain("stats/spatial", np.stack([maps.sum(0), (maps**2).sum(0)])[None], grid=(shard, 0, 0))
    if spec.summary_dim is not None:
        summary = np.full((1, meta.shard_images, spec.summary_dim), np.nan, np.float16)
        for number, features in enumerate(made):
            if features is not None and features[0] is not None:
                summary[0, number] = features[0]
        writer.write_plain("summary", summary, grid=(0, shard, 0))
        kept = summary[0][~np.isnan(summary[0]).any(axis=1)].astype(np.float64)
        writer.write_plain("stats/summary", np.stack([kept.sum(0), (kept**2).sum(0)])[None], grid=(shard, 0, 0))
    failures = tuple(Failure(row=row, reason="marked unusable") for row in rows if images[row] is None)
    tokens = sum(features is not None for features in made) * int(np.prod(spec.geometry.grid_hw))
    _commit(writer, rows, tokens, failures)


def _commit(writer: ShardWriter, rows: range, num_tokens: int, failures: tuple[Failure, ...]) -> None:
    writer.commit({"first_row": rows[0], "num_rows": len(rows), "num_tokens": num_tokens, "failures": failures})


__all__ = ["FakeTeachers", "fake_features", "fake_spec", "make_tiny_cache", "write_images"]
