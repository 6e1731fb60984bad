"""A small cache whose every number follows from a formula, and a writer of it that works as a build does, without a model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from radio_cache import Cache, TeacherSpec
from radio_cache.checks.verify import drop_teacher
from radio_cache.codecs import Codec, Half, KltZstd
from radio_cache.codecs.klt_basis import KltBasis
from radio_cache.errors import NotACacheError
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.schema import IMAGES_UNIT, CacheMeta, Container, Failure, ImageStatus
from radio_cache.reader import is_cache
from radio_cache.receipts import compact_receipts, drop_outdated_receipt, drop_receipt, unfinished_shards
from radio_cache.storage.local import LocalStorage
from radio_cache.testing import fake_spec
from radio_cache.writer import ImageIndex, ShardWriter, add_teacher, create_cache, grow_cache

SHARD_IMAGES = 6
LENGTHS = (27, 40)
"""Images before and after the cache grows; the last shard is short both times."""
PHASES = ("build", "grow", "repair", "drop a teacher")
SIZE_PX, PATCH_PX = 128, 8  # maps of 16 x 16 tokens
COMPACT_FROM = 3

# ---------------------------------------------------------------- the truth


def _klt(channels: int) -> KltZstd:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(channels, channels)))[0].astype(np.float32)
    return KltZstd(KltBasis(np.zeros(channels, np.float32), basis, np.ones(channels, np.float32)), 0.05)


def _spec(name: str, summary_dim: int | None, codec: Codec) -> TeacherSpec:
    spec = fake_spec(name, summary_dim=summary_dim, spatial_dim=24, size=SIZE_PX, patch=PATCH_PX)
    return replace(spec, codec=CodecRecord(parameters=codec.to_json()))


CODECS: dict[str, Codec] = {"half": Half(), "zstd": _klt(24)}
SPECS = {"half": _spec("half", 12, CODECS["half"]), "zstd": _spec("zstd", None, CODECS["zstd"])}


def unusable(row: int) -> bool:
    return row % 11 == 5


def features(name: str, row: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What the teacher says of an image: map (h, w, c) and summary (c,)."""
    rng = np.random.default_rng((len(name), ord(name[0]), row))
    return rng.normal(size=(16, 16, 24)).astype(np.float32), rng.normal(size=12).astype(np.float32)


def meta_of(num_images: int) -> CacheMeta:
    return CacheMeta(
        num_images=num_images,
        shard_images=SHARD_IMAGES,
        creator="kill_cycles.py",
        class_names=("a", "b"),
        max_pixels=10**6,
        containers=(Container(kind="folder", path="photos", prefix=""),),
    )


def index_of(num_images: int) -> ImageIndex:
    none = np.full(num_images, -1, np.int64)
    keys = [f"class-{row % 2}/photo-{row:05d}.jpg" for row in range(num_images)]
    return ImageIndex(keys, (np.arange(num_images) % 2).astype(np.int32), np.zeros(num_images, np.int32), none, none)


def size_hw(row: int) -> tuple[int, int]:
    return (0, 0) if unusable(row) else (100 + row, 200 + row)


def image_digest(row: int) -> NDArray[np.uint8]:
    return np.full(16, row % 251, np.uint8)


# ---------------------------------------------------------------- the writer


def write_images(storage: LocalStorage, meta: CacheMeta, shard: int) -> None:
    rows = meta.shard_rows(shard)
    status, sizes = np.zeros(SHARD_IMAGES, np.uint8), np.zeros((SHARD_IMAGES, 2), np.int32)
    digests = np.zeros((SHARD_IMAGES, 16), np.uint8)
    for number, row in enumerate(rows):
        status[number] = ImageStatus.UNUSABLE if unusable(row) else ImageStatus.OK
        sizes[number], digests[number] = size_hw(row), image_digest(row)
    drop_outdated_receipt(storage, IMAGES_UNIT, shard, len(rows), [row for row in rows if unusable(row)])
    writer = ShardWriter(storage, IMAGES_UNIT, shard)
    writer.write_plain("status", status, grid=(shard,))
    writer.write_plain("size_hw", sizes, grid=(shard, 0))
    writer.write_plain("digest", digests, grid=(shard, 0))
    _commit(writer, rows, 0)


def write_teacher(storage: LocalStorage, meta: CacheMeta, name: str, shard: int) -> None:
    rows = meta.shard_rows(shard)
    codec, spec = CODECS[name], SPECS[name]
    features_by_row = {row: features(name, row) for row in rows if not unusable(row)}
    drop_outdated_receipt(storage, name, shard, len(rows), [row for row in rows if unusable(row)])
    writer = ShardWriter(storage, name, shard)
    codes = [codec.encode(features_by_row[row][0]) if row in features_by_row else None for row in rows]
    grid = (0, shard, *(0 for _ in codec.row_shape((16, 16), 24)))
    writer.write_sharded("spatial", codes, grid=grid, chunks_per_shard=SHARD_IMAGES, zstd_level=codec.zstd_level)
    writer.write_plain("stats/spatial", _sums([value[0] for value in features_by_row.values()]), grid=(shard, 0, 0))
    if spec.summary_dim is not None:
        summary = np.full((1, SHARD_IMAGES, spec.summary_dim), np.nan, np.float16)
        for row, (_, value) in features_by_row.items():
            summary[0, row - rows[0]] = value
        writer.write_plain("summary", summary, grid=(0, shard, 0))
        writer.write_plain("stats/summary", _sums([value[1] for value in features_by_row.values()]), grid=(shard, 0, 0))
    _commit(writer, rows, 256 * len(features_by_row))


def _sums(values: list[NDArray[np.float32]]) -> NDArray[np.float64]:
    flat = np.concatenate([one.reshape(-1, one.shape[-1]) for one in values]).astype(np.float64)
    return np.stack([flat.sum(axis=0), np.square(flat).sum(axis=0)])[None]


def _commit(writer: ShardWriter, rows: range, num_tokens: int) -> None:
    failures = tuple(Failure(row=row, reason="made up") for row in rows if unusable(row))
    writer.commit({"first_row": rows[0], "num_rows": len(rows), "num_tokens": num_tokens, "failures": failures})


def fill(storage: LocalStorage) -> None:
    """Make all that is missing, as a build does."""
    cache = Cache(storage)
    meta = cache.meta
    for unit in (IMAGES_UNIT, *SPECS):
        if unit != IMAGES_UNIT and unit not in cache.teachers:
            add_teacher(storage, meta, SPECS[unit], CODECS[unit])
        for shard in unfinished_shards(cache.receipt_columns(unit), meta.shard_rows, meta.num_shards):
            if unit == IMAGES_UNIT:
                write_images(storage, meta, shard)
            else:
                write_teacher(storage, meta, unit, shard)
        compact_receipts(storage, unit, from_files=COMPACT_FROM)


def write(place: Path, phase: str) -> None:
    """One part of the cache's life, from wherever it stands."""
    storage = LocalStorage(place)
    if not is_cache(storage):
        try:
            create_cache(storage, meta_of(LENGTHS[0]), index_of(LENGTHS[0]))
        except NotACacheError:
            if not is_cache(storage):  # if it is one now, the other writer was faster
                raise
    storage.remove_leftovers()
    if phase == "grow" and Cache(storage).num_images < LENGTHS[1]:
        grow_cache(storage, meta_of(LENGTHS[1]), index_of(LENGTHS[1]))
    elif phase == "repair":
        for unit in (IMAGES_UNIT, *SPECS):
            drop_receipt(storage, unit, 2)
    elif phase == "drop a teacher" and "zstd" in Cache(storage).teachers:
        drop_teacher(Cache(storage), "zstd")
    fill(storage)
