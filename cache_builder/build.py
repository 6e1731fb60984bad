"""Stage 1: run the teachers once over the images, and keep what they say.

`build_cache` is the whole; `build_shard` is the unit of work: an ordinary function that writes one shard of one teacher,
may run twice with the same result, and returns a receipt. Files are read, decoded and resized in threads while the
teacher computes and the previous shard is written. Batches are cut within a shard, in row order, so the stored bytes do
not depend on the number of threads, nor on what an earlier run had already done.
"""

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_builder.calibrate import choose_codec
from cache_builder.preprocess import teacher_input, view_pixels
from cache_builder.scan import scan_shard
from cache_builder.sources import Listing, Request, Selection, list_for, record_listing
from cache_builder.sources.listing import begins_with, same_images
from cache_builder.stages import StageSeconds, Stopwatch
from cache_builder.teachers import FAMILIES, TeacherOptions, find_teacher, find_weights
from cache_builder.teachers.base import Teacher
from radio_cache import __version__
from radio_cache.cli_support import ProgressLine
from radio_cache.codecs import Half
from radio_cache.crops import ViewGeometry, valid_hw, valid_tokens
from radio_cache.errors import CodecError, ConfigError, ImageError, NotACacheError, SourceError, StaleCacheError
from radio_cache.fidelity import PERFECT, Fidelity, from_cosines
from radio_cache.images import MAX_PIXELS, decode_image
from radio_cache.prefetch import ahead
from radio_cache.reader import Cache, is_cache
from radio_cache.receipts import compact_receipts, drop_short_receipt, read_receipt, unfinished_shards
from radio_cache.schema import IMAGES_UNIT, CacheMeta, Receipt
from radio_cache.torch import MapEncoder
from radio_cache.writer import ShardWriter, add_teacher, create_cache, grow_cache, refuse_occupied, refuse_remains

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What to build. images: folders, tars, patterns. teachers: name -> options.

    shard_images: images in a shard, the unit of work and of retry. batch_images: images in one forward pass.
    filters, shuffle_seed, limit: which images, in what order (`Selection`). rescan: list the sources even if they look
    unchanged since the cache was made. max_pixels: larger images are refused. threads: for reading and decoding.
    """

    images: tuple[str, ...]
    teachers: dict[str, TeacherOptions]
    out: str | Path
    shard_images: int = 128
    batch_images: int = 32
    device: str = "cpu"
    filters: tuple[str, ...] = ()
    shuffle_seed: int | None = None
    limit: int | None = None
    rescan: bool = False
    max_pixels: int = MAX_PIXELS
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)

    def __post_init__(self) -> None:
        for name in ("shard_images", "batch_images", "max_pixels", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name.replace('_', ' ')} must be at least 1, not {getattr(self, name)}")
        if not self.images:
            raise ConfigError("no --images: name a folder of images, or WebDataset tars")
        if not self.teachers:
            raise ConfigError("no --teacher: name at least one; `radio-cache teachers` lists them")
        self.request()

    def request(self) -> Request:
        """All that decides which images there are. Raises ConfigError for what no image could pass."""
        selection = Selection(filters=self.filters, shuffle_seed=self.shuffle_seed, limit=self.limit)
        return Request(sources=self.images, selection=selection)


@dataclass(frozen=True)
class TeacherResult:
    """What one teacher's pass did. images: computed by this run, not counting unusable ones; seconds: wall time."""

    name: str
    images: int
    images_before: int
    seconds: float
    stages: StageSeconds


@dataclass(frozen=True)
class BuildReport:
    """What a build did. unusable: images that could not be used, over the whole cache."""

    cache: Cache
    notes: tuple[str, ...]
    results: tuple[TeacherResult, ...]
    unusable: int


def build_cache(config: BuildConfig, say: Say = lambda _: None) -> BuildReport:
    """Build a cache, or go on with one that was interrupted. The same command again does only what is missing.

    say: told one sentence at a time about what is going on.
    Raises SourceError, TeacherError, NotACacheError or StaleCacheError before any work is done or anything is written.
    """
    weights = {name: find_weights(find_teacher(name), options.weights) for name, options in config.teachers.items()}
    there = Cache(config.out) if is_cache(config.out) else None
    listing = list_for(config.request(), there, rescan=config.rescan)
    for note in listing.notes:
        say(note)
    cache = _open(config, listing) if there is not None else None
    if cache is None:
        with _unless_another_was_faster(config.out):
            refuse_occupied(config.out)
    # All teachers at once, in main memory: one that does not fit must not surface after hours with another.
    teachers: list[Teacher] = [
        FAMILIES[find_teacher(name).family](find_teacher(name), weights[name], options)
        for name, options in config.teachers.items()
    ]
    for teacher in teachers:
        for note in teacher.notes:
            say(f"{teacher.spec.name}: {note}")
    cache = cache or _create(config, listing)
    _check_same(cache, teachers)
    cache = _grown(cache, listing, say)
    record_listing(cache, config.request(), listing)
    results: list[TeacherResult] = []
    with ThreadPoolExecutor(config.threads, thread_name_prefix="decode") as pool:
        _scan(cache, pool, say)
        while teachers:
            teacher = teachers.pop(0)
            teacher.to(torch.device(config.device))
            cache = _join(cache, teacher, config, pool, say)
            results.append(_run_teacher(cache, teacher, config, pool))
            del teacher
    cache = Cache(config.out)
    return BuildReport(cache, listing.notes, tuple(results), len(cache.failures()))


def _create(config: BuildConfig, listing: Listing) -> Cache:
    meta = CacheMeta(
        num_images=len(listing.index.keys), shard_images=config.shard_images, creator=f"radio-cache {__version__}",
        containers=listing.containers, class_names=listing.class_names, max_pixels=config.max_pixels,
    )  # fmt: skip
    with _unless_another_was_faster(config.out):
        create_cache(config.out, meta, listing.index)
    return _open(config, listing)


@contextlib.contextmanager
def _unless_another_was_faster(out: str | Path) -> Generator[None]:
    """That the place is taken is no error if it holds a cache now: another build made it a moment ago."""
    try:
        yield
    except NotACacheError:
        if not is_cache(out):
            raise


def _open(config: BuildConfig, listing: Listing) -> Cache:
    """The cache that is there. Raises StaleCacheError if it was made neither from these images in this way, nor from
    the first of them."""
    cache = Cache(config.out)
    cache.storage.remove_leftovers()
    meta = cache.meta
    cure = "choose another --out, or remove that cache"
    grows = begins_with(listing, cache.index, meta)
    difference = None if grows or listing.recorded else same_images(cache.index, listing.index)
    if difference is None and not grows and meta.containers != listing.containers:
        difference = f"the same images elsewhere (then {meta.containers[0].path}, now {listing.containers[0].path})"
    if difference is not None:
        raise StaleCacheError(
            f"{config.out} was built from other images than this run asks for: now there are {difference}. "
            + cure.capitalize()
        )
    for name, then, now in (
        ("--shard-images", meta.shard_images, config.shard_images),
        ("--max-pixels", meta.max_pixels, config.max_pixels),
    ):
        if then != now:
            raise StaleCacheError(
                f"{config.out} was built with {name} {then}, this run asks for {now}: ask for {then}, {cure}"
            )
    return cache


def _grown(cache: Cache, listing: Listing, say: Say) -> Cache:
    """The cache itself, made longer if the listing goes on where it ends."""
    meta = cache.meta
    if not begins_with(listing, cache.index, meta):
        return cache
    grown = replace(meta, num_images=len(listing.index), containers=listing.containers, class_names=listing.class_names)
    grow_cache(cache.storage, grown, listing.index)
    say(f"{cache.url}: {grown.num_images - meta.num_images} images are added to the {meta.num_images} that are there")
    return Cache(cache.storage)


def _scan(cache: Cache, pool: ThreadPoolExecutor, say: Say) -> None:
    todo = _missing_shards(cache, IMAGES_UNIT)
    total = sum(len(cache.meta.shard_rows(shard)) for shard in todo)
    if todo:
        with ProgressLine("checking images", cache.num_images, done=cache.num_images - total) as progress:
            for shard in todo:
                progress.advance(scan_shard(cache, shard, pool).num_rows)
    compact_receipts(cache.storage, IMAGES_UNIT)
    failures = cache.failures()
    if failures:
        index = cache.index
        say(f"{len(failures)} of {cache.num_images} images cannot be used and are left out:")
        for failure in failures[:5]:
            say(f"  {index.key(failure.row)}: {failure.reason}")
        if len(failures) > 5:
            say(f"  ... and {len(failures) - 5} more: radio-cache info {cache.url} --failures")
    if len(failures) == cache.num_images:
        raise SourceError(f"none of the {cache.num_images} images can be used: radio-cache info {cache.url} --failures")


def _join(cache: Cache, teacher: Teacher, config: BuildConfig, pool: ThreadPoolExecutor, say: Say) -> Cache:
    """Choose the codec of a teacher that is new, and make its group. Raises StaleCacheError if it is another's now."""
    name = teacher.spec.name
    if name not in cache.teachers:

        def tokens_of(rows: list[int]) -> Iterator[NDArray[np.float32]]:
            with ProgressLine(f"{name}, calibrating", len(rows)) as line:
                pixels = _ahead(cache, teacher, rows, config, pool)
                for batch_rows, spatial, _ in _features(rows, pixels, teacher, cache, config, StageSeconds()):
                    line.advance(len(batch_rows))
                    valid = torch.from_numpy(_valid_tokens(cache, batch_rows, teacher.spec.geometry))
                    for image, mask in zip(spatial.cpu(), valid, strict=True):
                        yield image[mask].numpy()

        try:
            chosen = choose_codec(teacher.spec, cache.usable_rows(), tokens_of)
        except CodecError as exc:
            raise CodecError(f"{cache.url}, teacher '{name}': {exc}") from exc
        if chosen.note:
            say(f"{name}: {chosen.note}")
        add_teacher(cache.storage, cache.meta, replace(teacher.spec, codec=chosen.recorded), chosen.codec)
    joined = Cache(cache.storage)
    _check_same(joined, [teacher])  # another process may have been faster; what it chose is what counts
    return joined


def _check_same(cache: Cache, teachers: list[Teacher]) -> None:
    for asked in (teacher.spec for teacher in teachers):
        if asked.name not in cache.teachers:
            refuse_remains(cache.storage, asked.name)
            continue
        differences = cache.teachers[asked.name].spec.differences(asked)
        if differences:
            raise StaleCacheError(
                f"{cache.url}, teacher '{asked.name}': {'; '.join(differences)}. "
                "Ask for what the cache holds, or build into another --out"
            )


def _missing_shards(cache: Cache, unit: str) -> list[int]:
    return unfinished_shards(cache.receipt_columns(unit), cache.meta.shard_rows, cache.meta.num_shards)


def _run_teacher(cache: Cache, teacher: Teacher, config: BuildConfig, pool: ThreadPoolExecutor) -> TeacherResult:
    name = teacher.spec.name
    todo = _missing_shards(cache, name)
    total = sum(len(cache.meta.shard_rows(shard)) for shard in todo)
    done = cache.num_images - total
    stages = StageSeconds()
    started = time.perf_counter()
    usable = np.isin(np.arange(cache.num_images), cache.usable_rows())
    rows = [row for shard in todo for row in cache.meta.shard_rows(shard) if usable[row]]
    if todo:
        with (
            ThreadPoolExecutor(1, thread_name_prefix="write") as writers,
            ProgressLine(name, cache.num_images, done=done) as line,
        ):
            pixels = _ahead(cache, teacher, rows, config, pool)
            last: Future[Receipt] | None = None
            for shard in todo:
                shard_rows = [row for row in cache.meta.shard_rows(shard) if usable[row]]
                features = _compute(shard_rows, pixels, teacher, cache, config, stages, line)
                line.advance(len(cache.meta.shard_rows(shard)) - len(shard_rows), stages.bottleneck())
                with Stopwatch(stages, "write"):
                    if last is not None:
                        last.result()
                last = writers.submit(write_shard, cache, teacher, shard, shard_rows, features)
            with Stopwatch(stages, "write"):
                if last is not None:
                    last.result()
    compact_receipts(cache.storage, name)
    return TeacherResult(name, len(rows), int(usable.sum()) - len(rows), time.perf_counter() - started, stages)


def build_shard(cache: Cache, teacher: Teacher, shard: int, config: BuildConfig) -> Receipt:
    """Compute and commit one shard of one teacher: the unit of work.

    Writes only that shard's files and its receipt; may run twice, or in two places at once, with the same bytes.
    """
    usable = set(cache.usable_rows().tolist())
    rows = [row for row in cache.meta.shard_rows(shard) if row in usable]
    pixels = (_pixels(cache, row, teacher.spec.geometry) for row in rows)
    features = _compute(rows, pixels, teacher, cache, config, StageSeconds(), None)
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


def _compute(
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
    for batch_rows, spatial, batch_summary in _features(rows, pixels, teacher, cache, config, stages):
        with Stopwatch(stages, "encode"), torch.inference_mode():
            here = slice(done, done + len(batch_rows))
            try:
                encoded = encoder(spatial)
            except CodecError as exc:
                keys = [cache.index.key(row) for row in (batch_rows[0], batch_rows[-1])]
                raise CodecError(f"{cache.url}, teacher '{spec.name}', images {keys[0]} to {keys[1]}: {exc}") from exc
            codes[here] = encoded.codes.cpu().numpy()
            valid = torch.from_numpy(_valid_tokens(cache, batch_rows, spec.geometry)).to(device)
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


def _features(
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


def _ahead(
    cache: Cache, teacher: Teacher, rows: list[int], config: BuildConfig, pool: ThreadPoolExecutor
) -> Iterator[NDArray[np.uint8]]:
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


def _valid_tokens(cache: Cache, rows: list[int], geometry: ViewGeometry) -> NDArray[np.bool_]:
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
