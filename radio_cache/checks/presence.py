"""Whether what receipts vouch for is there, as far as names and sizes tell, and can be decoded: the look that costs little."""

from collections.abc import Sequence
from dataclasses import dataclass

from radio_cache.errors import CorruptShardError
from radio_cache.format.schema import receipt_path, unit_group
from radio_cache.reader import Cache
from radio_cache.receipts import UnitReceipts


@dataclass(frozen=True)
class CheckedFiles:
    """How many shards were looked at, and how many files they consist of."""

    num_shards: int
    num_files: int


def refuse_missing_files(cache: Cache, units: Sequence[str]) -> CheckedFiles:
    """Look whether every shard of these units has a receipt, and every file it names is there in the size it says.

    What decoding needs is read, no map is: `verify_cache` does. Raises CorruptShardError naming the first that is not, and
    how many, and StoreError for a teacher that cannot be decoded.
    """
    num_shards = num_files = 0
    wrong: list[tuple[str, str]] = []
    for unit in units:
        group = unit_group(unit)
        # One listing: in a bucket the size of each file would be a request.
        sizes = dict(cache.storage.list_files(group))
        finished: set[int] = set()
        for receipt in UnitReceipts(cache.storage, unit).all():
            finished.add(receipt.shard)
            for file in receipt.files:
                num_files += 1
                place = f"{group}/{file.path}"
                if sizes.get(place) != file.num_bytes:
                    problem = f"has {sizes[place]} bytes" if place in sizes else "is gone"
                    wrong.append((place, f"{problem}, and the receipt of its shard says {file.num_bytes} bytes"))
        wrong += [
            (receipt_path(unit, shard), "is gone") for shard in range(cache.meta.num_shards) if shard not in finished
        ]
        num_shards += len(finished)
        if unit in cache.teachers:
            cache.teachers[unit].maps(())  # decodes no map, but reads its document, the codec and the codec's arrays
    if wrong:
        place, what = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise CorruptShardError(
            f"{cache.storage.at(place)} {what}{more}: radio-cache repair {cache.url}, then run the same command again"
        )
    return CheckedFiles(num_shards, num_files)
