"""A copy of a cache: checked, then written or continued, shard by shard."""

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
"""Called with one sentence at a time about the progress."""


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
        source: the cache that was copied.
        target: the copy, opened after its last shard.
        units: one result for the images, then one per teacher.
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
        MissingRowsError: before anything is written, for shards that the source has not finished.
        UnsupportedFormatError: before anything is written, for a teacher with views that cannot be copied as a whole.
        CorruptShardError: for a damaged file of the source.

    Returns:
        The opened caches and the number of shards of each kind.
    """
    # Refusals that need no target come first, so that a refused command writes nothing.
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
        target = _register_teacher(target, source, name, transcodings[name], on_message)
    copyings = [
        Copying(source, target, unit, rows, transcodings.get(unit) is not None) for unit in (IMAGES_UNIT, *names)
    ]
    # All units before the first write: a target of another source must not grow by a single shard.
    for copying in copyings:
        _refuse_other_shards(copying)
    units: list[UnitCopied] = []
    with ThreadPoolExecutor(config.threads, thread_name_prefix="copy") as pool:
        units += [_copy_unit(copying, pool, config.threads) for copying in copyings]
    return CopyReport(source, Cache(target.storage), tuple(units))


def _copy_unit(copying: Copying, pool: ThreadPoolExecutor, threads: int) -> UnitCopied:
    target, unit = copying.target, copying.unit
    # A receipt is written last, so that a shard with one is complete and needs no other check.
    unfinished = unfinished_shards(target.receipt_columns(unit), target.meta.shard_rows, target.meta.num_shards)
    before = target.num_images - sum(len(target.meta.shard_rows(shard)) for shard in unfinished)
    written = copied_shards = assembled = 0
    if unfinished:
        with ProgressLine(unit, target.num_images, done=before) as line:
            receipts = prefetch_map(pool, lambda shard: copy_shard(copying, shard), unfinished, depth=threads)
            for shard, receipt in zip(unfinished, receipts, strict=True):
                written += sum(file.num_bytes for file in receipt.files)
                copied_shards += copying.is_kept(shard)
                assembled += not copying.transcoded and not copying.is_kept(shard)
                line.advance(receipt.num_rows, f"{human_bytes(written)} written")
    # Also when nothing was left to copy: an earlier run may have been killed before this line.
    compact_receipts(target.storage, unit)
    return UnitCopied(
        name=unit,
        before=target.meta.num_shards - len(unfinished),
        kept=copied_shards,
        assembled=assembled,
        transcoded=len(unfinished) - copied_shards - assembled,
        num_bytes=written,
    )


def _refuse_overlap(config: CopyConfig) -> None:
    source, target = (absolute_path_or_url(path_or_url).rstrip("/") for path_or_url in (config.source, config.target))
    # The slash keeps siblings such as cache.zarr and cache.zarr-copy apart.
    if source == target or source.startswith(f"{target}/") or target.startswith(f"{source}/"):
        raise ConfigError(f"{config.target} is {config.source} itself, or one lies in the other: choose another target")


def _teachers(source: Cache, config: CopyConfig) -> list[str]:
    """Return the names of the groups to copy, in the order of copying.

    A teacher's name stands for all its levels, the name of a level for that level only.
    """
    if not config.teachers:
        source.teachers.refuse_unreadable()
    chosen: list[str] = []
    for name in config.teachers or source.teachers:
        if name not in source.teachers.names() and name not in source.teachers:
            raise StoreError(f"{source.url}: " + unknown_name("cached teacher", name, source.teachers))
        levels = source.teachers.levels(name) if "@" not in name else (source.teachers[name],)
        chosen += [level.name for level in levels]
    # A level may be requested by its own name and by its teacher's.
    return list(dict.fromkeys(chosen))


def _refuse_idle_packing(source: Cache, names: list[str], config: CopyConfig) -> None:
    """Raise ConfigError if a packing is requested and no teacher can be transcoded."""
    labels = [source.teachers[name].spec.codec.label for name in names]
    if config.packing and not any(source.teachers[name].codec.transcodable for name in names):
        stored_as = ", ".join(f"{name} is stored as {label}" for name, label in zip(names, labels, strict=True))
        raise ConfigError(
            f"--packing applies only to klt, and in {source.url} {stored_as or 'there is no teacher'}: leave it out"
        )


def _refuse_unfinished(source: Cache, names: list[str], rows: NDArray[np.int64]) -> None:
    """Raise MissingRowsError if a shard that holds any of `rows` is not finished."""
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
    """Raise UnsupportedFormatError if a teacher with several views would have to be copied row by row.

    Only whole files can be copied for such teachers: assembling and transcoding handle one view per image.
    """
    for name in names:
        views = source.teachers[name].spec.views
        if views > 1 and (transcodings[name] or len(rows) < source.num_images):
            raise UnsupportedFormatError(
                f"{source.url}: teacher '{name}' has {views} views of every image, so it can only be copied with all images "
                "and in its packing: leave out --packing, --filter, --fraction and --limit, or copy other teachers (--teacher)"
            )


def _target(config: CopyConfig, source: Cache, rows: NDArray[np.int64], on_message: OnMessage) -> Cache:
    """Return the cache to write to, created if there is none yet.

    Raises:
        StaleCacheError: for a cache that holds other images than this copy would.
    """
    index = _index(source.index, rows)
    meta = replace(
        source.meta, num_images=len(rows), creator=f"radio-cache {__version__}", index=index_group(index_columns(index))
    )
    if not is_cache(config.target):
        create_cache(config.target, meta, index)
    target = Cache(config.target)
    # Temporary files of a killed run; the shards that they belong to are copied again.
    target.storage.remove_leftovers()
    difference = _meta_difference(target.meta, meta)
    if difference:
        raise StaleCacheError(
            f"{target.url} is no copy of these images of {source.url}: {difference}. Choose another target"
        )
    if target.teachers.keys() & source.teachers.keys():
        on_message(f"{target.url} exists: continuing this copy")
    return target


def _index(index: ImageIndex, rows: NDArray[np.int64]) -> ImageIndex:
    # Rows are unique and ascending, so that equal lengths mean all images.
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
        return "it has as many images, but different ones, or in another order"
    if (target_meta.containers, target_meta.class_names) != (expected_meta.containers, expected_meta.class_names):
        return "its images come from other folders or archives, or have other classes"
    return None


def _register_teacher(
    target: Cache, source: Cache, name: str, transcoding: TranscodingPlan | None, on_message: OnMessage
) -> Cache:
    """Return the target with a group for the teacher, added if it is not there yet.

    Raises:
        StaleCacheError: if the target has a group of this name with another spec or codec.
    """
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
            f"target, or run radio-cache drop-teacher {target.url} {name}"
        )
    return target


def _teacher_difference(
    target_teacher: CachedTeacher, source_teacher: CachedTeacher, transcoding: TranscodingPlan | None
) -> str | None:
    if replace(target_teacher.spec, codec=CodecRecord()) != replace(source_teacher.spec, codec=CodecRecord()):
        return "its spec differs"
    # The first caches recorded no checksums. The arrays themselves are compared below.
    codec = replace(target_teacher.spec.codec, array_checksums=None)
    if transcoding is None:
        same = codec == replace(source_teacher.spec.codec, array_checksums=None)
        source_arrays, target_arrays = source_teacher.codec.arrays(), target_teacher.codec.arrays()
        same = (
            same
            and source_arrays.keys() == target_arrays.keys()
            and all(np.array_equal(source_arrays[key], target_arrays[key]) for key in source_arrays)
        )
        return None if same else f"its codec, {codec.label}, differs"
    # The target keeps the parameters of its first calibration, so that only the requests must agree.
    new = transcoding.record()
    if (codec.request, codec.transcoded_from) == (new.request, new.transcoded_from):
        return None
    return f"it is stored as {codec.label}, requested as {codec.request}, and this copy requests {new.request}"


def _refuse_other_shards(copying: Copying) -> None:
    """Raise StaleCacheError if the target has a shard that should equal the source's and does not."""
    # The target may have fewer shards: a selection of rows.
    for target_receipt, source_receipt in zip(copying.target.receipts(copying.unit), copying.receipts, strict=False):
        if target_receipt and copying.is_kept(target_receipt.shard) and target_receipt != source_receipt:
            raise StaleCacheError(
                f"{copying.target.url}: shard {target_receipt.shard} of '{copying.unit}' differs from that of "
                f"{copying.source.url}, which was built again since, or never was its source: choose another target"
            )


__all__ = ["CopyConfig", "CopyReport", "UnitCopied", "copy_cache"]
