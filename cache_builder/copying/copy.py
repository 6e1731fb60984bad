"""A copy of a cache: checked, made or gone on with, shard by shard."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cache_builder.copying.config import CopyConfig
from cache_builder.copying.shard import Copying, copy_shard
from cache_builder.copying.transcode import TranscodingPlan, choose_codec, plan_transcoding
from radio_cache import __version__
from radio_cache.errors import (
    ConfigError,
    MissingRowsError,
    StaleCacheError,
    StoreError,
    UnsupportedFormatError,
    unknown_name,
)
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.schema import IMAGES_UNIT, CacheMeta
from radio_cache.images.index import ImageIndex, index_columns, index_group
from radio_cache.prefetch.ordered import prefetch_map
from radio_cache.reader import Cache, CachedTeacher, is_cache
from radio_cache.receipts import compact_receipts, unfinished_shards
from radio_cache.storage.base import absolute_path_or_url
from radio_cache.terminal.output import ProgressLine, human_bytes
from radio_cache.writer import add_teacher, create_cache

OnMessage = Callable[[str], None]
"""Told one sentence at a time about what is going on."""


@dataclass(frozen=True, kw_only=True)
class UnitCopied:
    """The result for the images or one teacher.

    Attributes:
        before: shards that existed already.
        kept: shards copied unchanged.
        assembled: shards assembled from selected rows.
        transcoded: shards encoded again.
        num_bytes: bytes written.
    """

    name: str
    before: int
    kept: int
    assembled: int
    transcoded: int
    num_bytes: int


@dataclass(frozen=True)
class CopyReport:
    """The result of a copy.

    Attributes:
        target: the copied cache.
    """

    source: Cache
    target: Cache
    units: tuple[UnitCopied, ...]


def copy_cache(config: CopyConfig, on_message: OnMessage = lambda _: None) -> CopyReport:
    """Copy a cache or a part of it. The same command again copies only what is missing.

    Args:
        config: of the copy.
        on_message: called with one sentence at a time about the progress.

    Raises:
        ConfigError: before anything is written, for rows that are not in the source, or impossible options.
        StoreError: before anything is written, for teachers that are not in the source.
        StaleCacheError: before anything is written, for a target with other contents.
        CorruptShardError: for a damaged file of the source.
    """
    _refuse_overlap(config)
    source = Cache(config.source)
    names = _teachers(source, config)
    source.refuse_unfounded()
    rows = config.rows(source.index.keys)
    _refuse_unfinished(source, names, rows)
    transcodings = {name: plan_transcoding(source.teachers[name], config.packing, config.fidelity) for name in names}
    _refuse_views(source, names, rows, transcodings)
    _refuse_idle_packing(source, names, config)
    if len(rows) < source.num_images:
        on_message(f"{len(rows)} of {source.num_images} images: {config.describe()}")
    target = _target(config, source, rows, on_message)
    for name in names:
        target = _join(target, source, name, transcodings[name], on_message)
    copyings = [
        Copying(source, target, unit, rows, transcodings.get(unit) is not None) for unit in (IMAGES_UNIT, *names)
    ]
    for copying in copyings:
        _refuse_other_shards(copying)
    units: list[UnitCopied] = []
    with ThreadPoolExecutor(config.threads, thread_name_prefix="copy") as pool:
        units += [_copy_unit(copying, pool, config.threads) for copying in copyings]
    return CopyReport(source, Cache(target.storage), tuple(units))


def _copy_unit(copying: Copying, pool: ThreadPoolExecutor, threads: int) -> UnitCopied:
    target, unit = copying.target, copying.unit
    todo = unfinished_shards(target.receipt_columns(unit), target.meta.shard_rows, target.meta.num_shards)
    before = target.num_images - sum(len(target.meta.shard_rows(shard)) for shard in todo)
    written = copied_shards = assembled = 0
    if todo:
        with ProgressLine(unit, target.num_images, done=before) as line:
            for shard, receipt in zip(
                todo, prefetch_map(pool, lambda s: copy_shard(copying, s), todo, depth=threads), strict=True
            ):
                written += sum(file.num_bytes for file in receipt.files)
                copied_shards += copying.is_kept(shard)
                assembled += not copying.transcoded and not copying.is_kept(shard)
                line.advance(receipt.num_rows, f"{human_bytes(written)} written")
    compact_receipts(target.storage, unit)
    return UnitCopied(
        name=unit,
        before=target.meta.num_shards - len(todo),
        kept=copied_shards,
        assembled=assembled,
        transcoded=len(todo) - copied_shards - assembled,
        num_bytes=written,
    )


def _refuse_overlap(config: CopyConfig) -> None:
    source, target = (absolute_path_or_url(place).rstrip("/") for place in (config.source, config.target))
    if source == target or source.startswith(f"{target}/") or target.startswith(f"{source}/"):
        raise ConfigError(f"{config.target} is {config.source} itself, or one lies in the other: copy to another place")


def _teachers(source: Cache, config: CopyConfig) -> list[str]:
    """Return groups of those to copy, in the order they are copied in. A teacher means all its levels, a level itself."""
    if not config.teachers:
        source.teachers.refuse_unreadable()
    chosen: list[str] = []
    for name in config.teachers or source.teachers:
        if name not in source.teachers.names() and name not in source.teachers:
            raise StoreError(f"{source.url}: " + unknown_name("cached teacher", name, source.teachers))
        levels = source.teachers.levels(name) if "@" not in name else (source.teachers[name],)
        chosen += [level.name for level in levels]
    return list(dict.fromkeys(chosen))


def _refuse_idle_packing(source: Cache, names: list[str], config: CopyConfig) -> None:
    """Raise ConfigError if a packing is requested and no teacher has one."""
    labels = [source.teachers[name].spec.codec.label for name in names]
    if config.packing and not any(source.teachers[name].codec.transcodable for name in names):
        stored_as = ", ".join(f"{name} is stored as {label}" for name, label in zip(names, labels, strict=True))
        raise ConfigError(f"--packing is about klt, and in {source.url} {stored_as or 'there is no teacher'}")


def _refuse_unfinished(source: Cache, names: list[str], rows: NDArray[np.int64]) -> None:
    """Raise MissingRowsError if a shard that rows are needed of is not there."""
    needed = np.unique(rows // source.meta.shard_images)
    for unit in (IMAGES_UNIT, *names):
        columns = source.receipt_columns(unit)
        missing = np.intersect1d(needed, unfinished_shards(columns, source.meta.shard_rows, source.meta.num_shards))
        if len(missing):
            raise MissingRowsError(
                f"{source.url}: '{unit}' is not complete: {len(missing)} of the {len(needed)} shards to be copied are not there, "
                f"the first is {missing[0]}: finish its build, or copy other teachers (--teacher) or images (--limit)"
            )


def _refuse_views(
    source: Cache, names: list[str], rows: NDArray[np.int64], transcodings: dict[str, TranscodingPlan | None]
) -> None:
    """Raise UnsupportedFormatError where views would have to be taken apart."""
    for name in names:
        views = source.teachers[name].spec.views
        if views > 1 and (transcodings[name] or len(rows) < source.num_images):
            raise UnsupportedFormatError(
                f"{source.url}: teacher '{name}' has {views} views of every image, and is copied as a whole or not at all: copy "
                "all images in their packing, or other teachers (--teacher)"
            )


def _target(config: CopyConfig, source: Cache, rows: NDArray[np.int64], on_message: OnMessage) -> Cache:
    """Return the cache to write to. Raises StaleCacheError for one that is no copy of these images."""
    index = _index(source.index, rows)
    meta = replace(
        source.meta, num_images=len(rows), creator=f"radio-cache {__version__}", index=index_group(index_columns(index))
    )
    if not is_cache(config.target):
        create_cache(config.target, meta, index)
    target = Cache(config.target)
    target.storage.remove_leftovers()
    difference = _meta_difference(target.meta, meta)
    if difference:
        raise StaleCacheError(
            f"{target.url} is no copy of these images of {source.url}: {difference}. Choose another place"
        )
    if target.teachers.keys() & source.teachers.keys():
        on_message(f"{target.url} is there: going on with it")
    return target


def _index(index: ImageIndex, rows: NDArray[np.int64]) -> ImageIndex:
    if len(rows) == len(index):
        return index
    keys = [index.key(row) for row in rows.tolist()]
    return ImageIndex(keys, index.labels[rows], index.container[rows], index.offset[rows], index.length[rows])


def _meta_difference(target_meta: CacheMeta, expected_meta: CacheMeta) -> str | None:
    for quantity, target_value, expected_value in (
        ("images", target_meta.num_images, expected_meta.num_images),
        ("images in a shard", target_meta.shard_images, expected_meta.shard_images),
        ("pixels at most", target_meta.max_pixels, expected_meta.max_pixels),
    ):
        if target_value != expected_value:
            return f"it has {target_value} {quantity}, the copy would have {expected_value}"
    if target_meta.index != expected_meta.index:
        return "it has as many images, but other ones, or in another order"
    if (target_meta.containers, target_meta.class_names) != (expected_meta.containers, expected_meta.class_names):
        return "its images come from other places, or have other classes"
    return None


def _join(target: Cache, source: Cache, name: str, transcoding: TranscodingPlan | None, on_message: OnMessage) -> Cache:
    """Return the target with a teacher's group in it. Raises StaleCacheError if that is another's."""
    if name not in target.teachers:
        teacher = source.teachers[name]
        spec, codec = teacher.spec, teacher.codec
        if transcoding:
            codec, recorded, note = choose_codec(source, name, transcoding)
            spec = replace(spec, codec=recorded)
            on_message(note)
        add_teacher(target.storage, target.meta, spec, codec)
        target = Cache(target.storage)
    difference = _teacher_difference(target.teachers[name], source.teachers[name], transcoding)
    if difference:
        raise StaleCacheError(
            f"{target.url} holds another teacher '{name}' than this copy of {source.url} would: {difference}. Choose another "
            f"place, or radio-cache drop-teacher {target.url} {name}"
        )
    return target


def _teacher_difference(
    target_teacher: CachedTeacher, source_teacher: CachedTeacher, transcoding: TranscodingPlan | None
) -> str | None:
    if replace(target_teacher.spec, codec=CodecRecord()) != replace(source_teacher.spec, codec=CodecRecord()):
        return "its spec is another"
    codec = replace(target_teacher.spec.codec, array_checksums=None)
    if transcoding is None:
        same = codec == replace(source_teacher.spec.codec, array_checksums=None)
        source_arrays, target_arrays = source_teacher.codec.arrays(), target_teacher.codec.arrays()
        same = (
            same
            and source_arrays.keys() == target_arrays.keys()
            and all(np.array_equal(source_arrays[key], target_arrays[key]) for key in source_arrays)
        )
        return None if same else f"its codec, {codec.label}, is another"
    new = transcoding.record()
    if (codec.request, codec.transcoded_from) == (new.request, new.transcoded_from):
        return None
    return f"it is stored as {codec.label}, asked for as {codec.request}, this copy asks for {new.request}"


def _refuse_other_shards(copying: Copying) -> None:
    """Raise StaleCacheError if the target has a shard that should have come from the source as it is, and did not."""
    for target_receipt, source_receipt in zip(copying.target.receipts(copying.unit), copying.receipts, strict=False):
        if target_receipt and copying.is_kept(target_receipt.shard) and target_receipt != source_receipt:
            raise StaleCacheError(
                f"{copying.target.url}: shard {target_receipt.shard} of '{copying.unit}' is another than that of "
                f"{copying.source.url}, "
                "which was built again since, or never was its source: choose another place"
            )


__all__ = ["CopyConfig", "CopyReport", "UnitCopied", "copy_cache"]
