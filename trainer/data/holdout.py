"""Which images of its cache a student was trained on, and which were held out of training.

An image is held out if the digest of its file, a number below 2^128, is small enough: copies of one file stay together, an
image is held out of every cache and every run with the same share, and a cache may grow.
"""

from typing import final

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import ConfigError
from radio_cache.reader import Cache
from trainer.model.image_split import DIGEST_BYTES, ImageSplit
from trainer.model.student import StudentConfig


def split_rows(
    cache: Cache, rows: NDArray[np.int64], share: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], ImageSplit]:
    """Divide the images that a run may use into those it is trained on and those held out, both in order.

    Args:
        cache: where they lie.
        rows: numbers of all images that could be trained on.
        share: of them to hold out, from 0 to below 1; unless it is 0, at least one is held out and one trained on.

    Raises:
        ConfigError: there are not two different images.
    """
    limit: str | None = None
    if share > 0:
        digests = {digest.tobytes() for digest in cache.digests[rows]}
        if len(digests) < 2:
            raise ConfigError(
                f"holdout={share:g}: {cache.url} has {len(rows)} images to train on, and all are of one file: --set holdout=0"
            )
        least, *_, greatest = sorted(int.from_bytes(digest, "big") for digest in digests)
        number = min(max(int(share * (1 << 8 * DIGEST_BYTES)), least), greatest - 1)
        limit = number.to_bytes(DIGEST_BYTES, "big").hex()
    rule = ImageSplit(in_cache=cache.num_images, trained_on=0, held_out=0, held_out_to=limit)
    held_out = rule.is_held_out(cache.digests[rows])
    number = int(held_out.sum())
    split = ImageSplit(in_cache=cache.num_images, trained_on=len(rows) - number, held_out=number, held_out_to=limit)
    return rows[~held_out], rows[held_out], split


@final
class ImagesOfRun:
    """Tells of any images, by the digests of their files, whether a student was trained on them, or they were held out.

    A student that recorded nothing (saved by an earlier version) counts as trained on all images of its cache. Of a cache that
    was not finished (`--allow-partial`), all images count that its teachers have seen by now.
    """

    def __init__(self, config: StudentConfig, cache: Cache | None = None) -> None:
        """Read the digests of the student's cache.

        Args:
            config: of the student (`load_student(run).config`).
            cache: the one it was trained on, or a copy of it, where that is not at `config.cache` any more.

        Raises:
            StoreError: the cache cannot be read.
        """
        cache = Cache(config.cache) if cache is None else cache
        self.split = config.images
        rows = cache.usable_rows([teacher.name for teacher in config.teachers])
        if self.split is not None:
            rows = rows[rows < self.split.in_cache]
        digests = cache.digests[rows]
        self._trained_on = _keys(digests[~self.held_out(digests)])

    def trained_on(self, digests: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return (n,) whether the student was trained on the files with these digests (n, 16)."""
        return np.isin(_keys(digests), self._trained_on)

    def held_out(self, digests: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return (n,) whether the run's rule holds these files (n, 16) out of training, wherever they lie."""
        return np.zeros(len(digests), np.bool_) if self.split is None else self.split.is_held_out(digests)


def _keys(digests: NDArray[np.uint8]) -> NDArray[np.void]:
    """(n, 16) bytes -> (n,) values that compare as a whole."""
    return np.ascontiguousarray(digests).view(np.dtype((np.void, DIGEST_BYTES))).ravel()
