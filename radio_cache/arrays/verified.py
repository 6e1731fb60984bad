"""Small arrays of a unit, all shards of them together, compared with what its receipts vouch for."""

from typing import Any

from numpy.typing import NDArray

from radio_cache.arrays.plain import PlainArray
from radio_cache.errors import CorruptShardError
from radio_cache.format.schema import unit_group
from radio_cache.format.zarr_json import DOCUMENT
from radio_cache.receipts import UnitReceipts
from radio_cache.storage.base import Storage


def read_verified_array(storage: Storage, unit: str, name: str, document: bytes, *, grows_along: int) -> NDArray[Any]:
    """Read a whole small array of a unit and compare it with the unit's receipts.

    Args:
        storage: of the cache.
        unit: "images" or a teacher's name.
        name: of the array, below the unit's group.
        document: expected document, except for a longer shape along the axis `grows_along`.
        grows_along: axis that may be longer, because a growing cache enlarges its arrays first.

    Raises:
        CorruptShardError: with the file and the cure.
    """
    place = f"{unit_group(unit)}/{name}"

    def damaged(file: str, what: str) -> CorruptShardError:
        # "c/0/7" -> [0, 7]. Along the growing axis a chunk is a shard.
        grid = [int(part) for part in file.split("/")[1:] if part.isdigit()]
        if file == DOCUMENT:
            cure = f"radio-cache repair {storage.url} writes it again"
            return CorruptShardError(f"{storage.at(f'{place}/{file}')} is damaged: {what}: {cure}")
        return damaged_file(storage, unit, f"{name}/{file}", grid[grows_along])

    def read() -> NDArray[Any]:
        array = PlainArray(storage, place, document=document, grows_along=grows_along, damaged=damaged)
        return array.read(vouched=UnitReceipts(storage, unit).checksums(name))

    try:
        return read()
    except CorruptShardError:
        return read()  # again: a builder replaces the receipt of a shard first and its files then


def damaged_file(storage: Storage, unit: str, file: str, shard: int) -> CorruptShardError:
    """Return the error for a file of a unit that differs from the shard's receipt, with the cure."""
    return CorruptShardError(
        f"{storage.at(f'{unit_group(unit)}/{file}')} (shard {shard}) is damaged or gone, although there is a receipt for it: "
        f"radio-cache repair {storage.url}, then run the build again"
    )
