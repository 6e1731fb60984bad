"""Receipts of finished shards: one small file each while a unit is being built, one log per unit when there are many.

`writer.py: ShardWriter.commit` writes a receipt, after the shard it describes. This module reads, compacts and deletes them.

A log is `receipts/<unit>/log-<its checksum>.jsonl`. It has one receipt per line, by shard, then a line
`{"of": unit, "columns": ...}` with the fields that a reader needs of all of them at once, and last
`{"lines", "columns_bytes", "columns_crc32c", "crc32c"}`, whose last checksum covers the lines of receipts. A receipt file takes
precedence over a line. A log is written before the files it replaces are deleted, and is named by its contents, so builders
that compact at the same time lose nothing.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast, final

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import CorruptShardError, StoreError
from radio_cache.format.checksums import crc32c
from radio_cache.format.schema import IMAGES_UNIT, MAX_SHARDS, Receipt, check_limit, receipt_path, receipts_folder
from radio_cache.format.strict_json import MAX_INTEGER, parse_json
from radio_cache.storage import open_storage
from radio_cache.storage.base import Storage

# Holds the columns of some thousand shards, so that most logs take one request.
_TAIL_BYTES = 1 << 16
_TRIES = 5
_AT_ONCE = 32
# Room for a failure of 256 bytes for each of the 2^20 images that a shard may have.
_MAX_RECEIPT_BYTES = 1 << 28
_FILE_NAME = re.compile(r"(\d{6,9})\.json")
# The columns of a log, in the order of `_numbers`.
_PER_SHARD = ("shard", "num_rows", "num_tokens", "num_failures", "num_bytes", "line_bytes")

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class ReceiptColumns:
    """All receipts of a unit as columns, by shard. num_bytes: of the shard's files. failed_rows: of all shards, sorted."""

    shard: NDArray[np.int64]
    num_rows: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    num_failures: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    failed_rows: NDArray[np.int64]


@final
class UnitReceipts:
    """The receipts of one unit, read at the first use, and again if a log that held them has been replaced since.

    Creating one reads nothing.
    """

    def __init__(self, place: Storage | str | Path, unit: str) -> None:
        self._storage, self._unit = open_storage(place), unit

    def columns(self) -> ReceiptColumns:
        """Return the common fields of all receipts.

        Raises:
            CorruptShardError: for a damaged receipt.
        """
        return self._loaded.columns

    def receipt(self, shard: int) -> Receipt | None:
        """Return one receipt, or None if the shard is not finished.

        Raises:
            CorruptShardError: if it is damaged.
        """
        return self._ask(lambda loaded: loaded.receipt(shard))

    def all(self) -> Iterator[Receipt]:
        """Yield every receipt, by shard.

        Raises:
            CorruptShardError: for a damaged receipt.
        """
        for shard in self._loaded.columns.shard.tolist():
            receipt = self.receipt(shard)
            if receipt is not None:
                yield receipt

    def checksums(self, array: str) -> dict[str, int]:
        """Return path below an array -> `checksums.file_crc32c` in its receipt, for all files of the array.

        Fast enough for caches of millions of images.

        Raises:
            CorruptShardError: for a damaged receipt.
        """
        return self._ask(lambda loaded: loaded.checksums(f"{array}/"))

    def _ask(self, question: Callable[["_Loaded"], T]) -> T:
        """Run a query again if a log disappeared: lines are read lazily, and another process may have written a new log since."""

        def answer() -> T:
            try:
                return question(self._loaded)
            except FileNotFoundError:
                # Clears the cached property, so that the next use lists the receipts again.
                self.__dict__.pop("_loaded", None)
                raise

        return _again(answer)

    @cached_property
    def _loaded(self) -> "_Loaded":
        return _again(lambda: _Loaded(self._storage, self._unit))


def read_receipt(place: Storage | str | Path, unit: str, shard: int) -> Receipt | None:
    """Return the receipt of one shard, or None if the shard is not finished.

    Raises:
        CorruptShardError: if it is damaged.
    """
    storage = open_storage(place)
    path = receipt_path(unit, shard)
    try:
        return _read(storage, path, unit, shard)
    except FileNotFoundError:
        return _again(lambda: _Loaded(storage, unit, files=False).receipt(shard))


def each_receipt(
    place: Storage | str | Path, unit: str, num_shards: int
) -> Iterator[tuple[int, Receipt | CorruptShardError | None]]:
    """Yield (shard, receipt) of every shard, with an error in place of a damaged receipt and None for an unfinished shard."""
    storage = open_storage(place)
    files, lines, error = _again(lambda: _listed_and_salvaged(storage, unit))
    # A damaged line shows as a shard without a receipt. If no shard lacks one, some shard is blamed all the same, so that
    # repair writes the log again.
    blamed = min(lines, default=0) if error and lines.keys() | files.keys() >= set(range(num_shards)) else None
    for shard in range(num_shards):
        try:
            if shard in files:
                yield shard, read_receipt(storage, unit, shard)  # another process may have moved it into a log since
            elif shard in lines and shard != blamed:
                yield shard, Receipt.from_json(parse_json(lines[shard]))
            else:
                yield shard, error
        except CorruptShardError as exc:
            yield shard, exc


def _listed_and_salvaged(
    storage: Storage, unit: str
) -> tuple[dict[int, str], dict[int, bytes], CorruptShardError | None]:
    """Return the paths of receipt files and the intact lines of logs, both by shard, and the error of a damaged log, if any."""
    files, logs = _listing(storage, unit)
    lines: dict[int, bytes] = {}
    error: CorruptShardError | None = None
    for log in logs:
        data = storage.read(log)
        intact, lost = _salvaged(data, unit)
        _merge(lines, intact)
        if lost or not _is_whole(storage, log, data, unit):
            error = _damaged(
                storage, log, f"{lost} lines lost" if lost else "its last lines are not what they should be"
            )
    return files, lines, error


def drop_receipt(place: Storage | str | Path, unit: str, shard: int) -> bool:
    """Make a shard unfinished, whether its receipt is a file, a line or damaged. Returns False if it was not finished.

    Damaged lines of a log are dropped, too, because their shards are unknown.
    """
    storage = open_storage(place)
    path = receipt_path(unit, shard)

    def drop() -> bool:
        dropped = storage.exists(path)
        for log in _listing(storage, unit)[1]:
            data = storage.read(log)
            intact, lost = _salvaged(data, unit)
            if shard in intact or lost or not _is_whole(storage, log, data, unit):
                dropped = True
                intact.pop(shard, None)
                # The new log exists before the old one is deleted: a kill in between leaves two equal ones.
                new = _write_log(storage, unit, intact)
                if new != log:
                    storage.delete(log)
        storage.delete(path)
        return dropped

    return _again(drop)


def is_finished(place: Storage | str | Path, receipt: Receipt | None, num_rows: int) -> bool:
    """Return whether a shard with this receipt is complete.

    A shard is incomplete if it grew since, or if an image that it lacks was read successfully later.
    """
    if receipt is None or receipt.num_rows != num_rows:
        return False
    if not receipt.failures or receipt.unit == IMAGES_UNIT:
        return True
    # A row that failed for the teacher and not for the scan was read successfully later.
    images = read_receipt(place, IMAGES_UNIT, receipt.shard)
    failed = {failure.row for failure in receipt.failures}
    return images is None or failed <= {failure.row for failure in images.failures}


def drop_outdated_receipt(
    place: Storage | str | Path, unit: str, shard: int, num_rows: int, failed_rows: Iterable[int]
) -> None:
    """Drop the receipt of a shard that is about to be made again with other rows.

    Its new files and its old receipt would contradict each other.
    """
    receipt = read_receipt(place, unit, shard)
    if receipt is None:
        return
    if receipt.num_rows != num_rows or {failure.row for failure in receipt.failures} != set(failed_rows):
        drop_receipt(place, unit, shard)


def compact_receipts(place: Storage | str | Path, unit: str, *, from_files: int = 256) -> None:
    """Move all receipts of a unit into one log. A kill at any moment loses no receipt.

    Args:
        place: storage, path or URL of the cache.
        unit: "images" or a teacher's name.
        from_files: least number of receipt files to compact. Fewer stay as they are, readable for people.
    """
    storage = open_storage(place)

    def compact() -> None:
        files, logs = _listing(storage, unit)
        if len(files) < max(1, from_files) and len(logs) <= 1:
            return
        lines: dict[int, bytes] = {}
        for log in logs:
            intact, lost = _salvaged(storage.read(log), unit)
            if lost:
                raise _damaged(storage, log, f"{lost} of its lines do not match their checksums")
            _merge(lines, intact)
        # Files after logs, because a file takes precedence over a line.
        for shard, receipt in _read_files(storage, unit, files).items():
            lines[shard] = _line(receipt)
        new = _write_log(storage, unit, lines)
        for log in logs:
            if log != new:
                storage.delete(log)
        _at_once(storage, storage.delete, list(files.values()))

    _again(compact)


class _Loaded:
    """The receipt files (optional) and logs of a unit, read once."""

    def __init__(self, storage: Storage, unit: str, *, files: bool = True) -> None:
        self._storage, self._unit = storage, unit
        paths, logs = _listing(storage, unit)
        self._own = _read_files(storage, unit, paths) if files else {}
        self._lazy: list[tuple[str, NDArray[np.int64], NDArray[np.int64]]] = []
        tables = [_own_table(self._own)] if self._own else []
        failed = [np.array([failure.row for receipt in self._own.values() for failure in receipt.failures], np.int64)]
        for log in logs:
            table, log_failed = _read_columns(storage, log, unit)
            # Lines are not read here: offsets follow from the lengths in the columns.
            self._lazy.append((log, table[:, 0], np.cumsum(table[:, 5]) - table[:, 5]))
            tables.append(table)
            failed.append(log_failed)
        self._tables = tables
        together = np.concatenate(tables) if tables else np.zeros((0, len(_PER_SHARD)), np.int64)
        # The first one of a shard counts: its own file, then the log that knows most rows of it.
        order = np.lexsort((-together[:, 1], np.arange(len(together)) >= len(self._own), together[:, 0]))
        together = together[order]
        together = together[np.concatenate([np.ones(min(1, len(together)), np.bool_), np.diff(together[:, 0]) > 0])]
        columns = {name: np.ascontiguousarray(together[:, at]) for at, name in enumerate(_PER_SHARD[:-1])}
        self.columns = ReceiptColumns(**columns, failed_rows=np.unique(np.concatenate(failed)))

    def receipt(self, shard: int) -> Receipt | None:
        if shard in self._own:
            return self._own[shard]
        best: Receipt | None = None
        for (log, shards, starts), table in zip(self._lazy, self._tables[-len(self._lazy) :], strict=True):
            at = int(np.searchsorted(shards, shard))
            if at < len(shards) and shards[at] == shard:
                (line,) = self._storage.read_ranges(log, [(int(starts[at]), int(table[at, 5]))])
                receipt = _parsed(self._storage, log, bytes(line), self._unit, shard)
                if best is None or receipt.num_rows > best.num_rows:
                    best = receipt
        return best

    def checksums(self, below: str) -> dict[str, int]:
        """Return the checksums of the files whose path begins with `below`, by the rest of the path."""
        checksums: dict[str, int] = {}
        rows: dict[int, int] = {}
        for log, shards, starts in self._lazy:
            data = self._storage.read(log)
            if not _is_whole(self._storage, log, data, self._unit):
                raise _damaged(self._storage, log, "its lines do not match their checksum")
            try:
                for shard, start in zip(shards.tolist(), starts.tolist(), strict=True):
                    # The checksum over all lines has just been compared: theirs need not be.
                    line = json.loads(data[start : data.index(b"\n", start)])
                    if shard not in self._own and line["num_rows"] > rows.get(shard, 0):
                        rows[shard] = line["num_rows"]
                        checksums |= _crcs_below(below, ((file["path"], file["crc32c"]) for file in line["files"]))
            except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as exc:
                raise _damaged(self._storage, log, f"a line is no receipt: {exc!r:.80}") from exc
        for receipt in self._own.values():
            checksums |= _crcs_below(below, ((file.path, file.crc32c) for file in receipt.files))
        return checksums


def _crcs_below(below: str, files: Iterable[tuple[str, int]]) -> dict[str, int]:
    return {path.removeprefix(below): crc for path, crc in files if path.startswith(below)}


def _own_table(receipts: dict[int, Receipt]) -> NDArray[np.int64]:
    return np.array([_numbers(receipt, 0) for _, receipt in sorted(receipts.items())], np.int64).reshape(
        -1, len(_PER_SHARD)
    )


def _numbers(receipt: Receipt, line_bytes: int) -> tuple[int, ...]:
    num_bytes = sum(file.num_bytes for file in receipt.files)
    return (receipt.shard, receipt.num_rows, receipt.num_tokens, len(receipt.failures), num_bytes, line_bytes)


def _listing(storage: Storage, unit: str) -> tuple[dict[int, str], list[str]]:
    """Return the paths of receipt files, by shard, and those of logs."""
    files: dict[int, str] = {}
    logs: list[str] = []
    for path, _ in storage.list_files(receipts_folder(unit)):
        name = path.rpartition("/")[2]
        if (match := _FILE_NAME.fullmatch(name)) and path == receipt_path(unit, int(match[1])):
            files[int(match[1])] = path
        elif name.startswith("log-") and name.endswith(".jsonl"):
            logs.append(path)
    return files, logs


def _read_files(storage: Storage, unit: str, files: dict[int, str]) -> dict[int, Receipt]:
    """Read receipt files, ordered by shard."""
    ordered = sorted(files.items())
    receipts = _at_once(storage, lambda one: _read(storage, one[1], unit, one[0]), ordered)
    return {shard: receipt for (shard, _), receipt in zip(ordered, receipts, strict=True)}


def _at_once(storage: Storage, do: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Call `do` on each item, in parallel for buckets, where every request is a wait."""
    if storage.is_local or len(items) < 2:
        return [do(item) for item in items]
    with ThreadPoolExecutor(min(_AT_ONCE, len(items)), thread_name_prefix="radio-cache-receipts") as pool:
        return list(pool.map(do, items))


def _read(storage: Storage, path: str, unit: str, shard: int) -> Receipt:
    """Read a receipt file."""
    return _parsed(storage, path, storage.read_at_most(path, _MAX_RECEIPT_BYTES), unit, shard)


def _parsed(storage: Storage, path: str, text: bytes, unit: str, shard: int) -> Receipt:
    try:
        receipt = Receipt.from_json(_object(parse_json(text)))
    except (ValueError, StoreError) as exc:
        raise _damaged(storage, path, str(exc)) from exc
    if (receipt.unit, receipt.shard) != (unit, shard):
        raise _damaged(storage, path, f"it is the receipt of another shard: {receipt.unit}, {receipt.shard}")
    return receipt


def _object(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{data!r:.40} is no receipt")  # noqa: TRY004 - it is about JSON, not about a caller
    return cast(dict[str, Any], data)


def _damaged(storage: Storage, path: str, what: str) -> CorruptShardError:
    return CorruptShardError(
        f"{storage.at(path)} is damaged ({what}): radio-cache repair {storage.url}, then run the build again"
    )


def _line(receipt: Receipt) -> bytes:
    return json.dumps(receipt.to_json(), separators=(",", ":")).encode() + b"\n"


def _merge(lines: dict[int, bytes], others: dict[int, bytes]) -> None:
    for shard, line in others.items():
        # Caches only grow, so the receipt of more rows is the later one.
        if shard not in lines or parse_json(line)["num_rows"] > parse_json(lines[shard])["num_rows"]:
            lines[shard] = line


def write_log(storage: Storage, unit: str, receipts: Iterable[Receipt]) -> str:
    """Write a log of these receipts, beside whatever there is; returns its path."""
    return _write_log(storage, unit, {receipt.shard: _line(receipt) for receipt in receipts})


def _write_log(storage: Storage, unit: str, lines: dict[int, bytes]) -> str:
    """Write a log of these lines; returns its path."""
    ordered = [lines[shard] for shard in sorted(lines)]
    receipts = [Receipt.from_json(parse_json(line)) for line in ordered]
    table = np.array([_numbers(receipt, len(line)) for receipt, line in zip(receipts, ordered, strict=True)], np.int64)
    columns: dict[str, list[int]] = dict(zip(_PER_SHARD, table.reshape(-1, len(_PER_SHARD)).T.tolist(), strict=True))
    # All shards together: a reader needs the set of unusable rows, not their shards.
    columns["failed_rows"] = sorted(failure.row for receipt in receipts for failure in receipt.failures)
    body = b"".join(ordered)
    second = json.dumps({"of": unit, "columns": columns}, separators=(",", ":")).encode() + b"\n"
    last = {
        "lines": len(ordered),
        "columns_bytes": len(second),
        "columns_crc32c": crc32c(second),
        "crc32c": crc32c(body),
    }
    # Named by its contents, so two processes that write the same log write the same file.
    path = f"{receipts_folder(unit)}/log-{crc32c(body):08x}.jsonl"
    storage.write(path, [body, second, json.dumps(last).encode() + b"\n"])
    return path


def _read_columns(storage: Storage, log: str, unit: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the (lines, 6) numbers of `_PER_SHARD` and the failed rows of a log, without reading its receipts."""
    tail, size = storage.read_tail(log, _TAIL_BYTES)
    try:
        last_bytes = len(tail) - tail.rindex(b"\n", 0, -1) - 1
        last = parse_json(tail[-last_bytes:])
        # A log may be empty, while the limit starts at 1.
        check_limit("receipts in a log", max(1, last["lines"]), MAX_SHARDS)
        length = last["columns_bytes"]
        if type(length) is not int or not 0 < length <= size - last_bytes:
            raise ValueError(f"columns of {length!r:.40} bytes")
        # A second read only for units with very many shards.
        if length + last_bytes > len(tail):
            tail, _ = storage.read_tail(log, length + last_bytes)
        second = tail[-length - last_bytes : -last_bytes]
        if crc32c(second) != last["columns_crc32c"]:
            raise ValueError("the columns do not match their checksum")
        document = parse_json(second)
        if document.get("of", unit) != unit:  # the first logs lack the field
            raise ValueError(f"it is the log of {document['of']!r:.40}")
        table = np.stack([_whole_numbers(document["columns"][name]) for name in _PER_SHARD], axis=1)
        failed = _whole_numbers(document["columns"]["failed_rows"])
        shards, lines = table[:, 0], table[:, 5]
        # The sum alone could overflow for hostile lengths.
        outside = lines.max(initial=0) > size or lines.sum() > size
        if len(table) != last["lines"] or (np.diff(shards) <= 0).any() or outside:
            raise ValueError("its columns contradict each other")
    except (KeyError, TypeError, ValueError, AttributeError, StoreError) as exc:
        raise _damaged(storage, log, str(exc)) from exc
    return np.ascontiguousarray(table), failed


def _whole_numbers(values: Any) -> NDArray[np.int64]:
    """Return a JSON list as an array.

    Raises:
        ValueError: if it holds other values than plausible whole numbers from 0 on.
    """
    array = np.array(values)
    if array.ndim != 1 or (
        # Well below 2^63, so that sums over millions of shards cannot overflow.
        len(array) and (array.dtype != np.int64 or array.min() < 0 or array.max() > MAX_INTEGER >> 8)
    ):
        raise ValueError("a column holds something else than whole numbers")
    return array.astype(np.int64)


def _salvaged(log: bytes, unit: str) -> tuple[dict[int, bytes], int]:
    """Return the intact lines of a unit's log, by shard, and the number of damaged ones."""
    intact: dict[int, bytes] = {}
    lost = 0
    for line in log.splitlines(keepends=True):
        try:
            data = _object(parse_json(line))
            if "unit" in data:
                if "crc32c" not in data or not line.endswith(b"\n"):
                    raise ValueError("cut short")
                receipt = Receipt.from_json(data)
                if receipt.unit != unit:
                    raise ValueError("of another unit")
                intact[receipt.shard] = line
            # The last two lines hold the columns and the checksums; any other one without a unit is damaged.
            elif "columns" not in data and "lines" not in data:
                lost += 1
        except (ValueError, StoreError):
            lost += 1
    return intact, lost


def _is_whole(storage: Storage, log: str, data: bytes, unit: str) -> bool:
    """Return whether the last lines of a log are intact and match the others."""
    try:
        table, _ = _read_columns(storage, log, unit)
        body = data[: int(table[:, 5].sum())]
        return crc32c(body) == parse_json(data[data.rindex(b"\n", 0, -1) + 1 :])["crc32c"]
    except (CorruptShardError, ValueError, KeyError, TypeError):
        return False


def _again(read: Callable[[], T]) -> T:
    """Read again if a file disappeared between listing and reading, because another process compacted it into a log."""
    for _ in range(_TRIES - 1):
        try:
            return read()
        except FileNotFoundError:
            continue
    return read()


def finished_rows(columns: ReceiptColumns, num_images: int, shard_images: int, out: NDArray[np.bool_]) -> None:
    """Clear `out` (n,) for rows without a valid receipt. A receipt from before the cache grew is valid for fewer rows."""
    num_shards = -(-num_images // shard_images)
    # Receipts beyond the end are leftovers of a longer cache, and are ignored.
    known = columns.shard < num_shards
    done = np.zeros(num_shards, np.bool_)
    done[columns.shard[known]] = True
    for shard in np.flatnonzero(~done).tolist():
        out[shard * shard_images : (shard + 1) * shard_images] = False
    # Receipts from before the cache grew cover the first rows of the last shard only.
    short = known & (columns.num_rows < shard_images)
    for shard, rows in zip(columns.shard[short].tolist(), columns.num_rows[short].tolist(), strict=True):
        out[shard * shard_images + rows : (shard + 1) * shard_images] = False


def shards_lacking_rows(columns: ReceiptColumns, images: ReceiptColumns, shard_images: int) -> list[int]:
    """Return the shards of a teacher that lack an image which was read successfully later.

    Args:
        columns: receipts of the teacher.
        images: receipts of the images.
        shard_images: images of a shard.
    """
    lacking = np.setdiff1d(columns.failed_rows, images.failed_rows) // shard_images
    return np.unique(lacking[np.isin(lacking, images.shard)]).tolist()


def unfinished_shards(columns: ReceiptColumns, shard_rows: Callable[[int], range], num_shards: int) -> list[int]:
    """Return the shards that a build must make: without a receipt, or with one from before the cache grew."""
    done = dict(zip(columns.shard.tolist(), columns.num_rows.tolist(), strict=True))
    return [shard for shard in range(num_shards) if done.get(shard) != len(shard_rows(shard))]
