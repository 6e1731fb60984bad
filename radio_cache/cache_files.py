"""The files that every part of an open cache reads: where they lie, the root document, receipts and columns of images."""

from functools import cached_property
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from radio_cache.arrays.verified import read_verified_array
from radio_cache.format.documents import images_documents
from radio_cache.format.schema import IMAGES_UNIT, CacheMeta, Receipt
from radio_cache.format.zarr_json import DOCUMENT
from radio_cache.images.index import refuse_unfounded
from radio_cache.receipts import ReceiptColumns, UnitReceipts
from radio_cache.storage.base import Storage

_NO_NEED_TO_LOOK = 1 << 20
"""Caches of up to this many images are read without comparing the index first."""


@final
class CacheFiles:
    """Files of a cache beneath its teachers and its images. Safe to share between threads, to fork and to pickle.

    Args:
        storage: where they lie.
        meta: the root document.
    """

    def __init__(self, storage: Storage, meta: CacheMeta) -> None:
        self.storage, self.meta = storage, meta
        self._founded = False

    def __reduce__(self) -> tuple[type["CacheFiles"], tuple[Storage, CacheMeta]]:
        # Without the columns read so far, which may take gigabytes.
        return (CacheFiles, (self.storage, self.meta))

    @property
    def url(self) -> str:
        """Path or URL of the cache, as the user typed it."""
        return self.storage.url

    @property
    def num_images(self) -> int:
        return self.meta.num_images

    @cached_property
    def sizes_hw(self) -> NDArray[np.int32]:
        """(n, 2) height and width of every image in pixels, upright; 0 where the image is unusable or not seen yet."""
        return self.column("size_hw")

    def receipts(self, unit: str) -> list[Receipt | None]:
        """Return the receipts of a unit ("images" or a teacher) by shard, with None for unfinished shards."""
        by_shard: list[Receipt | None] = [None] * self.meta.num_shards
        for receipt in UnitReceipts(self.storage, unit).all():
            # Receipts beyond the end are leftovers of a longer cache.
            if receipt.shard < len(by_shard):
                by_shard[receipt.shard] = receipt
        return by_shard

    def receipt_columns(self, unit: str) -> ReceiptColumns:
        """Return the common fields of a unit's receipts, fast enough for caches of millions of images."""
        return UnitReceipts(self.storage, unit).columns()

    def refuse_unfounded(self) -> None:
        """Raise CorruptShardError if the cache declares more images than it lists."""
        # Compares with a listing of the index, which is slow in a bucket, so only once and only for large caches.
        if not self._founded and self.num_images > _NO_NEED_TO_LOOK:
            refuse_unfounded(self.storage, self.meta.index, self.num_images)
            self._founded = True

    def column(self, name: str) -> NDArray[Any]:
        """Return a column of all images, by the name of its array. Raises CorruptShardError naming the file and the cure."""
        self.refuse_unfounded()
        document = dict(images_documents(self.meta))[f"{name}/{DOCUMENT}"]
        return read_verified_array(self.storage, IMAGES_UNIT, name, document, grows_along=0)
