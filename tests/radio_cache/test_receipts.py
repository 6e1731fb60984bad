"""Receipts: files of their own and lines of a log say the same; kills, damage and drops lose nothing else."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from radio_cache.errors import CorruptShardError, StorageError
from radio_cache.format.schema import Failure, Receipt, StoredFile, receipt_path
from radio_cache.receipts import (
    UnitReceipts,
    compact_receipts,
    drop_receipt,
    each_receipt,
    finished_rows,
    read_receipt,
    unfinished_shards,
)
from radio_cache.storage.base import Part, Storage
from radio_cache.storage.local import LocalStorage


def made(shard: int, *, num_rows: int = 4, tag: int = 0) -> Receipt:
    failures = (Failure(row=4 * shard + 1, reason="naïve \n reason"),) if shard % 2 else ()
    files = tuple(StoredFile(path=f"{name}/c/{shard}", num_bytes=100 + shard, crc32c=tag) for name in ("a", "b"))
    return Receipt(
        unit="t",
        shard=shard,
        first_row=4 * shard,
        num_rows=num_rows,
        num_tokens=10 * shard,
        failures=failures,
        files=files,
    )


def put(storage: Storage, receipt: Receipt) -> None:
    import json

    storage.write(receipt_path("t", receipt.shard), [json.dumps(receipt.to_json(), indent=1).encode()])


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    storage = LocalStorage(tmp_path, fsync=False)
    for shard in (0, 1, 2, 5, 9):
        put(storage, made(shard))
    return storage


def names(storage: Storage) -> list[str]:
    return [path.rpartition("/")[2] for path, _ in storage.list_files("receipts/t")]


def log_of(storage: LocalStorage) -> Path:
    (log,) = storage.local_path("receipts/t").glob("log-*.jsonl")
    return log


def test_compacting_changes_nothing_that_is_read(storage: LocalStorage) -> None:
    before = UnitReceipts(storage, "t")
    columns, receipts = before.columns(), list(before.all())
    compact_receipts(storage, "t", from_files=0)
    assert [name[:4] for name in names(storage)] == ["log-"]
    after = UnitReceipts(storage, "t")
    assert list(after.all()) == receipts == [made(shard) for shard in (0, 1, 2, 5, 9)]
    for name, column in vars(columns).items():
        np.testing.assert_array_equal(getattr(after.columns(), name), column, err_msg=name)
    assert columns.failed_rows.tolist() == [5, 21, 37]
    assert columns.num_bytes.tolist() == [200, 202, 204, 210, 218]
    assert read_receipt(storage, "t", 5) == made(5)
    assert read_receipt(storage, "t", 3) is None


def test_few_receipts_stay_files_that_people_can_read(storage: LocalStorage) -> None:
    compact_receipts(storage, "t", from_files=6)
    assert names(storage) == [f"{shard:06d}.json" for shard in (0, 1, 2, 5, 9)]
    compact_receipts(storage, "t", from_files=5)
    assert len(names(storage)) == 1


def test_compacting_twice_and_again_with_more_gives_one_log(storage: LocalStorage) -> None:
    compact_receipts(storage, "t", from_files=0)
    first = names(storage)
    compact_receipts(storage, "t", from_files=0)
    assert names(storage) == first
    put(storage, made(3))
    put(storage, made(5, tag=7))  # made again: the file counts, not the line
    assert read_receipt(storage, "t", 5) == made(5, tag=7)
    assert [receipt.shard for receipt in UnitReceipts(storage, "t").all()] == [0, 1, 2, 3, 5, 9]
    compact_receipts(storage, "t", from_files=0)
    assert len(names(storage)) == 1
    assert names(storage) != first
    assert read_receipt(storage, "t", 5) == made(5, tag=7)


def test_an_empty_unit_has_no_receipts(tmp_path: Path) -> None:
    compact_receipts(tmp_path, "t", from_files=0)
    assert UnitReceipts(tmp_path, "t").columns().shard.tolist() == []
    assert list(UnitReceipts(tmp_path, "t").all()) == []


@pytest.mark.parametrize("changes", range(8))
def test_killed_while_compacting_no_receipt_is_lost(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, changes: int
) -> None:
    done = 0
    write, delete = LocalStorage.write, LocalStorage.delete

    def count() -> None:
        nonlocal done
        if done == changes:
            raise StorageError("killed here")
        done += 1

    def counted_write(self: LocalStorage, path: str, parts: list[Part]) -> None:
        count()
        write(self, path, parts)

    def counted_delete(self: LocalStorage, path: str) -> None:
        count()
        delete(self, path)

    monkeypatch.setattr(LocalStorage, "write", counted_write)
    monkeypatch.setattr(LocalStorage, "delete", counted_delete)
    killed = False
    try:
        compact_receipts(storage, "t", from_files=0)
    except StorageError:
        killed = True
    assert killed == (changes < 6)  # one log is written, five files are deleted
    monkeypatch.undo()
    assert list(UnitReceipts(storage, "t").all()) == [made(shard) for shard in (0, 1, 2, 5, 9)]
    compact_receipts(storage, "t", from_files=0)
    assert len(names(storage)) == 1
    assert list(UnitReceipts(storage, "t").all()) == [made(shard) for shard in (0, 1, 2, 5, 9)]


def test_two_builders_that_compact_at_once_lose_nothing(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """One has read the files when the other finishes a shard, compacts and deletes them."""
    write = LocalStorage.write

    def meanwhile(self: LocalStorage, path: str, parts: list[Part]) -> None:
        monkeypatch.undo()
        put(storage, made(7))
        compact_receipts(storage, "t", from_files=0)
        write(self, path, parts)

    monkeypatch.setattr(LocalStorage, "write", meanwhile)
    compact_receipts(storage, "t", from_files=0)
    assert [receipt.shard for receipt in UnitReceipts(storage, "t").all()] == [0, 1, 2, 5, 7, 9]
    compact_receipts(storage, "t", from_files=0)
    assert [receipt.shard for receipt in UnitReceipts(storage, "t").all()] == [0, 1, 2, 5, 7, 9]
    assert len(names(storage)) == 1


def test_a_receipt_whose_log_is_replaced_while_it_is_read_is_found_in_the_new_one(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    compact_receipts(storage, "t", from_files=0)
    read = LocalStorage.read_ranges

    def meanwhile(self: LocalStorage, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        monkeypatch.undo()
        put(storage, made(7))
        compact_receipts(storage, "t", from_files=0)
        return read(self, path, ranges)

    monkeypatch.setattr(LocalStorage, "read_ranges", meanwhile)
    assert read_receipt(storage, "t", 2) == made(2)


def test_receipts_of_a_log_that_is_gone_since_they_were_listed_are_those_of_the_new_one(storage: LocalStorage) -> None:
    compact_receipts(storage, "t", from_files=0)
    receipts, others = UnitReceipts(storage, "t"), UnitReceipts(storage, "t")
    assert receipts.columns().shard.tolist() == others.columns().shard.tolist() == [0, 1, 2, 5, 9]
    put(storage, made(7))
    compact_receipts(storage, "t", from_files=0)
    assert receipts.receipt(2) == made(2)
    assert others.checksums("a") == dict.fromkeys((f"c/{shard}" for shard in (0, 1, 2, 5, 7, 9)), 0)


@pytest.mark.parametrize("compacted", [False, True])
def test_a_dropped_shard_is_unfinished_and_the_others_stay(storage: LocalStorage, compacted: bool) -> None:
    if compacted:
        compact_receipts(storage, "t", from_files=0)
    assert drop_receipt(storage, "t", 2)
    assert not drop_receipt(storage, "t", 2)
    assert read_receipt(storage, "t", 2) is None
    assert [receipt.shard for receipt in UnitReceipts(storage, "t").all()] == [0, 1, 5, 9]


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_in_a_log_is_noticed_named_and_mended(storage: LocalStorage, seed: int) -> None:
    compact_receipts(storage, "t", from_files=0)
    log = log_of(storage)
    rng = np.random.default_rng(seed)
    data = bytearray(log.read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    log.write_bytes(data)
    found = dict(each_receipt(storage, "t", 10))
    bad = [shard for shard, receipt in found.items() if isinstance(receipt, CorruptShardError)]
    right = [shard for shard, receipt in found.items() if isinstance(receipt, Receipt)]
    for shard in right:
        assert found[shard] == made(shard)
    if len(right) == 5 and not bad:
        assert list(UnitReceipts(storage, "t").all()) == [made(shard) for shard in right]
        return  # a space became another kind of space
    assert bad
    assert str(log) in str(found[bad[0]])
    assert "radio-cache repair" in str(found[bad[0]])
    for shard in bad:
        drop_receipt(storage, "t", shard)
    mended = list(UnitReceipts(storage, "t").all())
    assert all(receipt == made(receipt.shard) for receipt in mended)
    assert len(mended) >= 4


@pytest.mark.parametrize("length", [0, 1, 50, 500])
def test_a_log_cut_short_is_named(storage: LocalStorage, length: int) -> None:
    compact_receipts(storage, "t", from_files=0)
    log_of(storage).write_bytes(log_of(storage).read_bytes()[:length])
    with pytest.raises(CorruptShardError, match=r"log-.*\.jsonl is damaged .*radio-cache repair"):
        UnitReceipts(storage, "t").columns()
    assert any(isinstance(receipt, CorruptShardError) for _, receipt in each_receipt(storage, "t", 10))
    drop_receipt(storage, "t", 0)
    UnitReceipts(storage, "t").columns()


def test_receipts_from_before_a_cache_grew_vouch_for_their_rows_only(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path, fsync=False)
    put(storage, made(0))
    put(storage, made(2, num_rows=1))
    columns = UnitReceipts(storage, "t").columns()
    rows = np.ones(11, np.bool_)
    finished_rows(columns, 11, 4, rows)
    assert np.flatnonzero(rows).tolist() == [0, 1, 2, 3, 8]
    assert unfinished_shards(columns, lambda shard: range(4 * shard, min(4 * shard + 4, 11)), 3) == [1, 2]
