"""Is a cache right? Every receipt against its files, every document against what the spec says, and how to mend it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from radio_cache.errors import RadioCacheError, StorageError, StoreError, UnsupportedFormatError, unknown_name
from radio_cache.reader import Cache, CachedTeacher
from radio_cache.receipts import drop_receipt, each_receipt
from radio_cache.schema import (
    ATTRIBUTES_KEY,
    IMAGES_UNIT,
    TRANSFORM,
    Receipt,
    receipt_path,
    receipts_folder,
    unit_group,
)
from radio_cache.shards import CRC_BYTES, crc32c, file_crc32c
from radio_cache.storage import Storage
from radio_cache.writer import teacher_documents
from radio_cache.zarr_documents import array_difference

_ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong. place: path below the cache. shard: of `unit`, None where it is the unit's as a whole.

    mendable: whether `repair` can bring it to a state from which a build restores it.
    """

    unit: str
    shard: int | None
    place: str
    what: str
    mendable: bool


@dataclass(frozen=True)
class VerifyReport:
    """damages: everything found. shards: receipts there are, by unit; missing: shards that were never finished, by unit."""

    damages: tuple[Damage, ...]
    shards: dict[str, int]
    missing: dict[str, int]

    @property
    def ok(self) -> bool:
        return not self.damages


def verify_cache(cache: Cache, *, deep: bool = False) -> VerifyReport:
    """Compare every receipt with its files, byte by byte, and every document with what the cache's spec says it is.

    deep: also decode every map and summary, and compare which rows there are with what the images say.
    """
    damages = list(_index_damages(cache))
    shards: dict[str, int] = {}
    missing: dict[str, int] = {}
    for unit in (IMAGES_UNIT, *cache.teachers):
        shards[unit] = missing[unit] = 0
        unit_damages = list(_document_damages(cache, unit))
        for shard, receipt in each_receipt(cache.storage, unit, cache.meta.num_shards):
            if receipt is None:
                missing[unit] += 1
                continue
            shards[unit] += 1
            if isinstance(receipt, StoreError):
                unit_damages.append(Damage(unit, shard, receipt_path(unit, shard), str(receipt), mendable=True))
                continue
            found = list(_shard_damages(cache, unit, shard, receipt))
            if deep and not found and not unit_damages and unit != IMAGES_UNIT:
                found = list(_deep_damages(cache, cache.teachers[unit], shard, receipt))
            unit_damages += found
        damages += unit_damages
    return VerifyReport(tuple(damages), shards, missing)


def repair_cache(cache: Cache, report: VerifyReport) -> list[str]:
    """Drop what `verify_cache` condemned, so that a build makes just that again; returns what was done, in words.

    Nothing else is touched. What cannot be mended is left, and named.
    """
    done: list[str] = []
    for damage in report.damages:
        if not damage.mendable:
            done.append(f"left alone: {damage.place}: {damage.what}")
        elif damage.shard is None:
            _rewrite_document(cache, damage)
            done.append(f"{damage.place}: written again from the spec")
        else:
            if drop_receipt(cache.storage, damage.unit, damage.shard):
                done.append(f"{damage.unit}, shard {damage.shard}: dropped, the next build makes it again")
    return done


def drop_teacher(cache: Cache, name: str) -> int:
    """Remove one teacher and all it wrote; returns the bytes freed. The images and the other teachers stay as they are.

    Receipts go first: killed at any moment, what is left is a teacher that is not finished. Raises StoreError for a
    teacher that is not there.
    """
    if name not in cache.teachers:
        raise StoreError(f"{cache.url}: " + unknown_name("cached teacher", name, cache.teachers))
    group, receipts = unit_group(name), receipts_folder(name)
    freed = sum(size for folder in (group, receipts) for _, size in cache.storage.list_files(folder))
    cache.storage.delete_tree(receipts)
    cache.storage.delete_tree(group)
    return freed


def _index_damages(cache: Cache) -> Iterator[Damage]:
    try:
        index = cache.index
        for column in (index.labels, index.container, index.offset, index.length, [*index.keys]):
            if len(column) != cache.num_images:
                what = "the columns of the image index differ in length"
                yield Damage(IMAGES_UNIT, None, cache.meta.index, what, mendable=False)
                return
    except (StorageError, UnsupportedFormatError):
        raise
    except (RadioCacheError, ValueError, OSError, KeyError, UnicodeDecodeError) as exc:
        what = f"the image index cannot be read ({exc}): restore images/ from a copy, or build a new cache"
        yield Damage(IMAGES_UNIT, None, cache.meta.index, what, mendable=False)


def _shard_damages(cache: Cache, unit: str, shard: int, receipt: Receipt) -> Iterator[Damage]:
    rows = cache.meta.shard_rows(shard)
    place = receipt_path(unit, shard)
    said = (receipt.unit, receipt.shard, receipt.first_row, receipt.num_rows)
    # It may speak of fewer rows, from before the cache grew: then the next build makes the shard again.
    if said[:3] != (unit, shard, rows.start) or not 0 < receipt.num_rows <= len(rows):
        yield Damage(unit, shard, place, f"it is the receipt of another shard: {said}", mendable=True)
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
            yield Damage(unit, shard, path, str(exc), mendable=True)
            continue
        if len(data) != file.num_bytes:
            what = f"{len(data)} bytes long, the receipt says {file.num_bytes}"
            yield Damage(unit, shard, path, what, mendable=True)
        elif file_crc32c(data) != file.crc32c or not _closing_crc_fits(cache, unit, file.path, data):
            yield Damage(unit, shard, path, "does not match its checksum", mendable=True)


def _closing_crc_fits(cache: Cache, unit: str, path: str, data: bytes) -> bool:
    """The last four bytes are no part of the receipt's checksum: they are one themselves, of a chunk or of an index."""
    covered = data[:-CRC_BYTES]
    if path.startswith("spatial/"):
        covered = covered[-16 * cache.meta.shard_images :]
    return crc32c(covered) == int.from_bytes(data[-CRC_BYTES:], "little")


def _deep_damages(cache: Cache, teacher: CachedTeacher, shard: int, receipt: Receipt) -> Iterator[Damage]:
    bad = {failure.row for failure in receipt.failures}
    rows = [row for row in cache.meta.shard_rows(shard)[: receipt.num_rows] if row not in bad]
    place = f"{unit_group(teacher.name)}, shard {shard}"
    try:
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[first : first + _ROWS_AT_ONCE]
            if not np.isfinite(teacher.maps(some)).all():
                yield Damage(teacher.name, shard, place, "a map decodes to values that are not finite", mendable=True)
            if teacher.spec.summary_dim is not None:
                teacher.summaries(some)
    except StoreError as exc:
        yield Damage(teacher.name, shard, place, str(exc), mendable=True)


def _document_damages(cache: Cache, unit: str) -> Iterator[Damage]:
    """The metadata of every array of a teacher, beside what its spec would make."""
    if unit == IMAGES_UNIT:
        return
    teacher = cache.teachers[unit]
    try:
        codec = teacher.codec
    except UnsupportedFormatError:
        raise
    except RadioCacheError as exc:
        what = f"{exc}; or drop the teacher: radio-cache drop-teacher {cache.url} {unit}"
        yield Damage(unit, None, f"{unit_group(unit)}/{TRANSFORM}", what, mendable=False)
        return
    for path, expected in teacher_documents(cache.meta, teacher.spec, codec):
        place = f"{unit_group(unit)}/{path}"
        what = _document_difference(expected, cache.storage, place, grows_along=0 if path.startswith("stats/") else 1)
        if what:
            yield Damage(unit, None, place, what, mendable=True)


def _document_difference(expected: bytes, storage: Storage, path: str, *, grows_along: int) -> str | None:
    try:
        ours: Any = json.loads(storage.read(path))
    except (FileNotFoundError, NotADirectoryError):
        return "gone"
    except (StorageError, ValueError) as exc:
        return f"cannot be read ({exc})"
    theirs: Any = json.loads(expected)
    if "crc32c" not in ours.get("attributes", {}).get(ATTRIBUTES_KEY, {}):
        theirs["attributes"].get(ATTRIBUTES_KEY, {}).pop("crc32c", None)  # the first caches had none
    if ours == theirs:
        return None
    # A cache that was about to grow has longer arrays than it says.
    longer = theirs["node_type"] == "array" and theirs["attributes"] == ours.get("attributes")
    fits = longer and array_difference(json.dumps(ours).encode(), expected, grows_along=grows_along) is None
    return None if fits else "is not what the teacher's spec says"


def _rewrite_document(cache: Cache, damage: Damage) -> None:
    teacher = cache.teachers[damage.unit]
    documents = dict(teacher_documents(cache.meta, teacher.spec, teacher.codec))
    cache.storage.write(damage.place, [documents[damage.place.removeprefix(f"{unit_group(damage.unit)}/")]])
