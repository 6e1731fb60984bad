"""The unit of work: one shard of one teacher, computed, encoded and committed.

Batches are cut within a shard, in row order, so the stored bytes depend neither on the number of threads, nor on what an
earlier run had already done.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_builder.build_config import BuildConfig
from cache_builder.preprocess import teacher_input, view_pixels
from cache_builder.stages import StageSeconds, Stopwatch
from cache_builder.teachers.base import Teacher
from radio_cache.cli_support import ProgressLine
from radio_cache.codecs import Half
from radio_cache.crops import ViewGeometry, valid_hw, valid_tokens
from radio_cache.errors import CodecError, ImageError, SourceError
from radio_cache.fidelity import PERFECT, Fidelity, from_cosines
from radio_cache.images import decode_image
from radio_cache.prefetch import ahead
from radio_cache.reader import Cache
from radio_cache.receipts import drop_short_receipt, read_receipt
from radio_cache.schema import IMAGES_UNIT, Receipt
from radio_cache.torch import MapEncoder
from radio_cache.writer import ShardWriter


def build_shard(cache: Cache, teacher: Teacher, shard: int, config: BuildConfig) -> Receipt:
    """Compute and commit one shard of one teacher: the unit of work.

    Writes only that shard's files and its receipt; may run twice, or in two places at once, with the same bytes.
    """
    usable = set(cache.usable_rows().tolist())
    rows = [row for row in cache.meta.shard_rows(shard) if row in usable]
    pixels = (_pixels(cache, row, teacher.spec.geometry) for row in rows)
    features = compute_shard(rows, pixels, teacher, cache, config, StageSeconds(), None)
    return write_shard(cache, teacher, shard, rows, features)


@dataclass(frozen=True)
class ShardFeatures:
    """What one shard stores of its usable rows, in row order, and what it cost.

    codes (n, *row_shape); summary (n, c) or None; spatial_sums (2, c): sum and sum of squares over `num_tokens` tokens.
    """

    codes: NDArray[Any]
    summary: NDArray[np.float32] | None
    spatial_sums: NDArray[np.float64]
    num_tokens: int
    fidelity: Fidelity


def compute_shard(
    rows: list[int], pixels: Iterator[NDArray[np.uint8]], teacher: Teacher, cache: Cache,
    config: BuildConfig, stages: StageSeconds, line: ProgressLine | None,
) -> ShardFeatures:  # fmt: skip
    """Forward passes and encoding of one shard, batch by batch: full-precision maps never pile up."""
    spec, device = teacher.spec, torch.device(config.device)
    cached = cache.teachers[spec.name]
    encoder = MapEncoder(cached.codec, device)
    codes = np.empty((len(rows), *cached.row_shape), cached.codec.dtype)
    summary = None if spec.summary_dim is None else np.empty((len(rows), spec.summary_dim), np.float32)
    sums = np.zeros((2, spec.spatial_dim))
    cosines = [np.zeros(0, np.float32)]
    squared_errors = 0.0
    done = 0
    for batch_rows, spatial, batch_summary in forward_passes(rows, pixels, teacher, cache, config, stages):
        with Stopwatch(stages, "encode"), torch.inference_mode():
            here = slice(done, done + len(batch_rows))
            try:
                encoded = encoder(spatial)
            except CodecError as exc:
                keys = [cache.index.key(row) for row in (batch_rows[0], batch_rows[-1])]
                raise CodecError(f"{cache.url}, teacher '{spec.name}', images {keys[0]} to {keys[1]}: {exc}") from exc
            codes[here] = encoded.codes.cpu().numpy()
            valid = torch.from_numpy(tokens_on_images(cache, batch_rows, spec.geometry)).to(device)
            tokens = spatial[valid].double()
            sums += torch.stack([tokens.sum(dim=0), tokens.square().sum(dim=0)]).cpu().numpy()
            cosines.append(encoded.cosines[valid].float().cpu().numpy())
            squared_errors += float(encoded.squared_errors[valid].double().sum())
            if summary is not None and batch_summary is not None:
                summary[here] = batch_summary.float().cpu().numpy()
        done += len(batch_rows)
        if line:
            line.advance(len(batch_rows), stages.bottleneck())
    measured = np.concatenate(cosines)
    if len(measured) == 0:
        return ShardFeatures(codes, summary, sums, 0, PERFECT)
    variance = float((sums[1] - np.square(sums[0]) / len(measured)).sum())
    return ShardFeatures(codes, summary, sums, len(measured), from_cosines(measured, squared_errors, variance))


def forward_passes(
    rows: list[int], pixels: Iterator[NDArray[np.uint8]], teacher: Teacher, cache: Cache, config: BuildConfig,
    stages: StageSeconds,
) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:  # fmt: skip
    """Forward passes: for each batch its rows, spatial features (b, h, w, c) in float32 on the device, summary or None."""
    spec, device = teacher.spec, torch.device(config.device)
    dtype = getattr(torch, spec.compute_dtype)
    for first in range(0, len(rows), config.batch_images):
        batch_rows = rows[first : first + config.batch_images]
        with Stopwatch(stages, "decode"):
            batch = np.stack([next(pixels) for _ in batch_rows])
        with Stopwatch(stages, "teacher"), torch.inference_mode():
            valid = [_valid_hw(cache, row, spec.geometry) for row in batch_rows]
            images = teacher_input(torch.from_numpy(batch).to(device), valid, spec.normalisation)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                out = teacher(images)
            spatial = out.spatial.float()
        yield batch_rows, spatial, out.summary


def pixels_ahead(
    cache: Cache, teacher: Teacher, rows: list[int], config: BuildConfig, pool: ThreadPoolExecutor
) -> Iterator[NDArray[np.uint8]]:
    """What the teacher is shown of these rows, in order, made ahead in the pool."""
    return ahead(
        pool,
        lambda row: _pixels(cache, row, teacher.spec.geometry),
        rows,
        depth=2 * config.batch_images + config.threads,
    )


def write_shard(cache: Cache, teacher: Teacher, shard: int, rows: list[int], features: ShardFeatures) -> Receipt:
    """Commit one shard: codes, summaries, sums for the statistics, and last the receipt."""
    spec, meta = teacher.spec, cache.meta
    shard_rows = meta.shard_rows(shard)
    drop_short_receipt(cache.storage, spec.name, shard, len(shard_rows))
    writer = ShardWriter(cache.storage, spec.name, shard)
    cached = cache.teachers[spec.name]
    chunks: list[NDArray[Any] | None] = [None] * len(shard_rows)
    for row, codes in zip(rows, features.codes, strict=True):
        chunks[row - shard_rows[0]] = codes
    writer.write_sharded(
        "spatial", chunks, grid=(0, shard, *(0 for _ in cached.row_shape)), chunks_per_shard=meta.shard_images,
        zstd_level=cached.codec.zstd_level,
    )  # fmt: skip
    writer.write_plain("stats/spatial", features.spatial_sums[None], grid=(shard, 0, 0))
    if features.summary is not None:
        summary = np.full((1, meta.shard_images, features.summary.shape[1]), np.nan, np.float16)
        try:
            summary[0, [row - shard_rows[0] for row in rows]] = Half().encode(features.summary)
        except CodecError as exc:
            raise CodecError(f"{cache.url}, teacher '{spec.name}', shard {shard}, summary: {exc}") from exc
        writer.write_plain("summary", summary, grid=(0, shard, 0))
        writer.write_plain("stats/summary", _sums(features.summary)[None], grid=(shard, 0, 0))
    failures = read_receipt(cache.storage, IMAGES_UNIT, shard)
    return writer.commit({
        "first_row": shard_rows[0], "num_rows": len(shard_rows), "num_tokens": features.num_tokens,
        "failures": failures.failures if failures else (), "fidelity": features.fidelity,
    })  # fmt: skip


def _sums(features: NDArray[np.float32]) -> NDArray[np.float64]:
    """(2, c): sum and sum of squares over all but the last axis, in float64, so that shards merge exactly enough."""
    flat = features.reshape(-1, features.shape[-1]).astype(np.float64)
    return np.stack([flat.sum(axis=0), np.square(flat).sum(axis=0)])


def tokens_on_images(cache: Cache, rows: list[int], geometry: ViewGeometry) -> NDArray[np.bool_]:
    """(len(rows), grid_h, grid_w): tokens that show the image."""
    return np.stack([valid_tokens((int(h), int(w)), geometry) for h, w in cache.sizes_hw[rows]])


def _valid_hw(cache: Cache, row: int, geometry: ViewGeometry) -> tuple[int, int]:
    h, w = cache.sizes_hw[row]
    return valid_hw((int(h), int(w)), geometry)


def _pixels(cache: Cache, row: int, geometry: ViewGeometry) -> NDArray[np.uint8]:
    try:
        return view_pixels(decode_image(cache.read_file(row), max_pixels=cache.meta.max_pixels), geometry)
    except ImageError as exc:
        raise SourceError(
            f"image {cache.index.key(row)} was fine when the images were checked, and now: {exc}. "
            "Put it back and run the same command again, or build a new cache"
        ) from exc
