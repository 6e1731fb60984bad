"""Is a cache right? Every receipt against its files, every document against what the spec says, and how to mend it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import (
    CorruptShardError,
    RadioCacheError,
    StorageError,
    StoreError,
    UnsupportedFormatError,
    unknown_name,
)
from radio_cache.format.checksums import CRC_BYTES, crc32c, file_crc32c
from radio_cache.format.documents import (
    PIXELS,
    Documents,
    grows_along,
    images_documents,
    index_documents,
    teacher_documents,
)
from radio_cache.format.schema import (
    ATTRIBUTES_KEY,
    IMAGES_UNIT,
    TRANSFORM,
    Receipt,
    StoredFile,
    receipt_path,
    receipts_folder,
    unit_group,
)
from radio_cache.format.strict_json import parse_json
from radio_cache.format.zarr_json import DOCUMENT, MAX_DOCUMENT_BYTES, array_difference, group_document
from radio_cache.images.index import StoredKeys, index_columns, index_group
from radio_cache.reader import Cache, CachedTeacher
from radio_cache.receipts import drop_receipt, each_receipt
from radio_cache.storage.base import Storage

_INDEX_CURE = "restore images/ from a copy, or build a new cache"


@dataclass(frozen=True)
class Damage:
    """One damaged thing.

    Attributes:
        unit: "images" or a teacher's name.
        shard: of the unit; None for damage of the unit as a whole.
        place: path below the cache.
        what: the damage, in words.
        mendable: whether `repair` and a build can restore it.
        is_unread: whether it could not be read now. It may be intact, and is left unchanged.
    """

    unit: str
    shard: int | None
    place: str
    what: str
    mendable: bool
    is_unread: bool = False


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify_cache`.

    Attributes:
        damages: all damage.
        shards: number of finished shards, by unit.
        missing: number of unfinished shards, by unit.
    """

    damages: tuple[Damage, ...]
    shards: dict[str, int]
    missing: dict[str, int]

    @property
    def ok(self) -> bool:
        return not self.damages


def verify_cache(cache: Cache, *, deep: bool = False) -> VerifyReport:
    """Compare every receipt with its files, byte by byte, and every document with the cache's spec.

    Args:
        cache: to verify.
        deep: also decode every map and summary, and compare the rows with the receipts of the images.
    """
    damages = [*_index_damages(cache), *_lost_teachers(cache)]
    shards: dict[str, int] = {}
    missing: dict[str, int] = {}
    for unit in (IMAGES_UNIT, *cache.teachers):
        shards[unit] = missing[unit] = 0
        unit_damages = [*_transform_damages(cache, unit), *_document_damages(cache, unit)]
        # Maps cannot be decoded with a damaged codec or document, which is reported already.
        decodable = not unit_damages
        for shard, receipt in each_receipt(cache.storage, unit, cache.meta.num_shards):
            if receipt is None:
                missing[unit] += 1
                continue
            shards[unit] += 1
            if isinstance(receipt, StoreError):
                unit_damages.append(Damage(unit, shard, receipt_path(unit, shard), str(receipt), mendable=True))
                continue
            shard_damages = list(_shard_damages(cache, unit, shard, receipt))
            if deep and decodable and not shard_damages and unit != IMAGES_UNIT:
                shard_damages = list(_deep_damages(cache, cache.teachers[unit], shard, receipt))
            unit_damages += shard_damages
        damages += unit_damages
    return VerifyReport(tuple(damages), shards, missing)


def repair_cache(cache: Cache, report: VerifyReport) -> list[str]:
    """Drop everything that `verify_cache` found damaged, so that a build makes exactly that again.

    Nothing else is touched. Damage that cannot be mended is left, and named.

    Returns:
        A line for each damage.
    """
    done: list[str] = []
    for damage in report.damages:
        if damage.is_unread:
            done.append(f"not read, and left alone: {damage.place}: {damage.what}")
        elif not damage.mendable:
            done.append(f"left alone: {damage.place}: {damage.what}")
        elif damage.shard is None:
            _rewrite_document(cache, damage)
            done.append(f"{damage.place}: written again from the spec")
        else:
            # Dropping the receipt is enough: a shard without one counts as unfinished.
            if drop_receipt(cache.storage, damage.unit, damage.shard):
                done.append(f"{damage.unit}, shard {damage.shard}: dropped, the next build makes it again")
    return done


def drop_teacher(cache: Cache, name: str) -> int:
    """Remove one teacher with all its files and return the bytes freed. Images and other teachers stay unchanged.

    Receipts go first: after a kill at any moment, an unfinished teacher is left.

    Raises:
        StoreError: for an absent teacher, or one that another process on this machine is building.
    """
    known = _names_below(cache)
    if name not in known:
        raise StoreError(f"{cache.url}: " + unknown_name("cached teacher", name, known))
    with cache.storage.locked(unit_group(name), wait=False) as held:
        if not held:
            raise StoreError(
                f"{cache.url}: teacher '{name}' is being built by another process: stop that build first; it keeps what is done"
            )
        freed = teacher_bytes(cache, name)
        # Without receipts the rest is an unfinished teacher, wherever a kill interrupts.
        cache.storage.delete_tree(receipts_folder(name))
        cache.storage.delete_tree(unit_group(name))
    return freed


def teacher_bytes(cache: Cache, name: str) -> int:
    """Return the bytes that a teacher takes on the disk, readable or not."""
    folders = (unit_group(name), receipts_folder(name))
    return sum(size for folder in folders for _, size in cache.storage.list_files(folder))


def _names_below(cache: Cache) -> set[str]:
    """Return the names of all teachers with any file left, readable or not."""
    names = {*cache.teachers, *cache.storage.list_folders("teachers"), *cache.storage.list_folders("receipts")}
    return names - {IMAGES_UNIT}


def _index_damages(cache: Cache) -> Iterator[Damage]:
    group = cache.meta.index
    try:
        cache.refuse_unfounded()
        index = cache.index
        columns = index_columns(index)
        if group not in (IMAGES_UNIT, index_group(columns)):  # the first caches' index has a fixed name
            what = f"its columns are not those that its name was made from: {_INDEX_CURE}"
            yield Damage(IMAGES_UNIT, None, group, what, mendable=False)
        if not 0 <= int(index.container.min()) <= int(index.container.max()) < len(cache.meta.containers):
            what = f"images lie in places that the cache does not name (it names {len(cache.meta.containers)}): {_INDEX_CURE}"
            yield Damage(IMAGES_UNIT, None, f"{group}/container", what, mendable=False)
    except RadioCacheError as exc:
        if _is_unread(exc) or (isinstance(exc, StorageError | UnsupportedFormatError) and not cache.storage.is_local):
            raise
        what = f"the image index cannot be read ({exc}): {_INDEX_CURE}"
        yield Damage(IMAGES_UNIT, None, group, what, mendable=False)


def _lost_teachers(cache: Cache) -> Iterator[Damage]:
    """Yield teachers that cannot be read at all, and those whose document is missing."""
    cure = "restore it from a copy, or drop the teacher and build it again: radio-cache drop-teacher"
    for name, error in cache.teachers.unreadable.items():
        place = f"{unit_group(name)}/{DOCUMENT}"
        blocked = _is_unread(error)
        what = (
            str(error) if blocked or isinstance(error, CorruptShardError) else f"{error}; or {cure} {cache.url} {name}"
        )
        yield Damage(name, None, place, what, mendable=False, is_unread=blocked)
    # Receipts are the last thing a teacher gets, and the first it loses.
    for name in cache.storage.list_folders("receipts"):
        if name not in (IMAGES_UNIT, *cache.teachers, *cache.teachers.unreadable):
            place = f"{unit_group(name)}/{DOCUMENT}"
            what = f"gone, although there are receipts: {cure} {cache.url} {name}"
            yield Damage(name, None, place, what, mendable=False)


def _shard_damages(cache: Cache, unit: str, shard: int, receipt: Receipt) -> Iterator[Damage]:
    rows = cache.meta.shard_rows(shard)
    place = receipt_path(unit, shard)
    identity = (receipt.unit, receipt.shard, receipt.first_row, receipt.num_rows)
    # Fewer rows are valid: the receipt is from before the cache grew, and the next build makes the shard again.
    if identity[:3] != (unit, shard, rows.start) or not 0 < receipt.num_rows <= len(rows):
        yield Damage(unit, shard, place, f"it is the receipt of another shard: {identity}", mendable=True)
        return
    for file in receipt.files:
        path = f"{unit_group(unit)}/{file.path}"
        try:
            data = cache.storage.read(path)
        except FileNotFoundError:
            yield Damage(unit, shard, path, "gone, although there is a receipt for it", mendable=True)
            continue
        except StorageError as exc:
            if not cache.storage.is_local:  # a bucket that cannot be reached is not damaged
                raise
            yield Damage(unit, shard, path, str(exc), mendable=not _is_unread(exc), is_unread=_is_unread(exc))
            continue
        what = file_difference(file, data, cache.meta.shard_images)
        if what:
            yield Damage(unit, shard, path, what, mendable=True)


def file_difference(file: StoredFile, data: bytes, shard_images: int) -> str | None:
    """Describe the difference between a file's bytes and its receipt; None without one."""
    if len(data) != file.num_bytes:
        return f"{len(data)} bytes long, the receipt says {file.num_bytes}"
    # The last four bytes are no part of the receipt's checksum: they are one themselves, of a chunk or of an index.
    covered = memoryview(data)[:-CRC_BYTES]
    if file.path.startswith(("spatial/", f"{PIXELS}/")):
        # The last checksum of a shard file covers its index alone: 16 bytes for each chunk.
        covered = covered[-16 * shard_images :]
    # The receipt's checksum leaves out the last four bytes, which are compared here.
    closing_fits = crc32c(covered) == int.from_bytes(data[-CRC_BYTES:], "little")
    return None if file_crc32c(data) == file.crc32c and closing_fits else "does not match its checksum"


def _deep_damages(cache: Cache, teacher: CachedTeacher, shard: int, receipt: Receipt) -> Iterator[Damage]:
    bad = {failure.row for failure in receipt.failures}
    rows = [row for row in cache.meta.shard_rows(shard)[: receipt.num_rows] if row not in bad]
    place = f"{unit_group(teacher.name)}, shard {shard}"
    spec = teacher.spec
    try:
        for batch in teacher.batches(rows):
            # Damaged codes may decode to infinities, which are reported below instead of warned about.
            with np.errstate(all="ignore"):
                finite = all(np.isfinite(teacher.maps(batch, view=view)).all() for view in range(spec.views))
            if not finite:
                yield Damage(teacher.name, shard, place, "a map decodes to values that are not finite", mendable=True)
    except StoreError as exc:
        yield Damage(teacher.name, shard, place, str(exc), mendable=not _is_unread(exc), is_unread=_is_unread(exc))
        return
    if spec.summary_dim is not None and rows:
        yield from _summary_damages(cache, teacher.name, shard, np.array(rows), spec.views, spec.summary_dim)


def _summary_damages(
    cache: Cache, name: str, shard: int, rows: NDArray[np.int64], views: int, channels: int
) -> Iterator[Damage]:
    """Yield damaged summaries, read from the shard's own files.

    `CachedTeacher.summaries` reads those of all shards, and would blame this shard for another one.
    """
    meta = cache.meta
    for view in range(views):
        place = f"{unit_group(name)}/summary/c/{view}/{shard}/0"
        try:
            stored = cache.storage.read(place)[:-CRC_BYTES]
        except FileNotFoundError:
            yield Damage(name, shard, place, "gone", mendable=True)
            continue
        except StorageError as exc:
            yield Damage(name, shard, place, str(exc), mendable=not _is_unread(exc), is_unread=_is_unread(exc))
            continue
        if len(stored) != meta.shard_images * channels * 2:
            yield Damage(name, shard, place, "does not hold the summaries of a shard", mendable=True)
            continue
        # (shard_images, c), without a copy
        summaries = np.frombuffer(stored, "<f2").reshape(meta.shard_images, channels)
        if np.isnan(summaries[rows - shard * meta.shard_images]).any():
            yield Damage(name, shard, place, "an image that is usable has no summary", mendable=True)


def _transform_damages(cache: Cache, unit: str) -> Iterator[Damage]:
    if unit == IMAGES_UNIT:
        return
    try:
        cache.teachers[unit].codec  # noqa: B018
    # A codec of a newer version is no damage, and repair must not touch it.
    except UnsupportedFormatError:
        raise
    except RadioCacheError as exc:
        if _is_unread(exc):
            yield Damage(unit, None, f"{unit_group(unit)}/{TRANSFORM}", str(exc), mendable=False, is_unread=True)
            return
        what = f"{exc}; or drop the teacher: radio-cache drop-teacher {cache.url} {unit}"
        yield Damage(unit, None, f"{unit_group(unit)}/{TRANSFORM}", what, mendable=False)


def _document_damages(cache: Cache, unit: str) -> Iterator[Damage]:
    """Yield damaged metadata of the groups and arrays of a unit, compared with the cache's spec."""
    for place, expected in _documents(cache, unit):
        below = place.removeprefix(f"{unit_group(unit)}/")
        try:
            what = _document_difference(expected, cache.storage, place, grows_along(below))
        except StorageError as exc:
            if not _is_unread(exc):
                raise
            yield Damage(unit, None, place, str(exc), mendable=False, is_unread=True)
            continue
        if what:
            yield Damage(unit, None, place, what, mendable=True)


def _documents(cache: Cache, unit: str) -> Documents:
    """Yield (path below the cache, content) of the documents of a unit; none if its codec, which decides them, is lost."""
    if unit == IMAGES_UNIT:
        documents = [(f"{IMAGES_UNIT}/{path}", data) for path, data in images_documents(cache.meta)]
        yield from [("teachers/" + DOCUMENT, group_document()), *documents]
        try:
            # The length of `key_bytes` follows from the keys. A damaged index is reported by `_index_damages`.
            keys = cache.index.keys
            length = keys.num_bytes if isinstance(keys, StoredKeys) else 0
        except RadioCacheError:
            return
        if cache.meta.index != IMAGES_UNIT:  # the first caches' had no checksums
            for path, data in index_documents(cache.num_images, length):
                yield f"{cache.meta.index}/{path}", data
        return
    teacher = cache.teachers[unit]
    try:
        codec = teacher.codec
    except RadioCacheError:
        return
    for path, data in teacher_documents(cache.meta, teacher.spec, codec):
        yield f"{unit_group(unit)}/{path}", data


def _document_difference(expected: bytes, storage: Storage, path: str, axis: int | None) -> str | None:
    try:
        stored = storage.read_at_most(path, MAX_DOCUMENT_BYTES)
        ours: Any = parse_json(stored)
        # Documents of the first caches have no checksum, and are compared without it.
        sealed = "crc32c" in dict(ours["attributes"].get(ATTRIBUTES_KEY, {}))
    except FileNotFoundError:
        return "gone"
    except (StoreError, ValueError, TypeError, KeyError, AttributeError) as exc:
        if _is_unread(exc) or (isinstance(exc, StorageError) and not storage.is_local):
            raise
        return f"cannot be read ({exc})"
    theirs: Any = json.loads(expected)
    if not sealed:
        theirs["attributes"].get(ATTRIBUTES_KEY, {}).pop("crc32c", None)  # the first caches had none
    if ours == theirs:
        return None
    # Growth enlarges the arrays before the cache declares more images, so a growth that was killed leaves longer ones.
    longer = theirs["node_type"] == "array" and theirs["attributes"] == ours["attributes"]
    fits = longer and array_difference(stored, expected, grows_along=axis) is None
    return None if fits else "is not what the cache's spec says"


def _is_unread(error: Exception) -> bool:
    """Return whether the system refused a read of a local cache: no permission, no descriptor, a failing disk.

    Such an error reveals nothing about the stored bytes. Symbolic links and other irregular files are refused by radio-cache
    itself, and count as damage.
    """
    return isinstance(error, StorageError) and isinstance(error.__cause__, OSError)


def _rewrite_document(cache: Cache, damage: Damage) -> None:
    cache.storage.write(damage.place, [dict(_documents(cache, damage.unit))[damage.place]])
