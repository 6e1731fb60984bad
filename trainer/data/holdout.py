"""The split of a cache's images into those that a student is trained on and those held out.

An image is held out if the digest of its file, a number below 2^128, is below a limit. Copies of one file stay together, the same
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
    """Split the usable images of a run into training and held-out rows, both in order.

    Args:
        cache: cache of the images.
        rows: all usable rows.
        share: share to hold out, from 0 to below 1; above 0, at least one image is held out and one is trained on.

    Returns:
        Training rows, held-out rows, and the rule that split them.

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
        # Clamped, so that both parts have an image whatever the share and the number of images.
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
    """Membership of images in a student's training or held-out set, by the digests of their files.

    A student without a recorded split (saved by an earlier version) counts as trained on all images of its cache. In a cache that
    was unfinished (`--allow-partial`), every image with features of all teachers by now counts.
    """

    def __init__(self, config: StudentConfig, cache: Cache | None = None) -> None:
        """Read the digests of the student's cache.

        Args:
            config: configuration of the student (`load_student(run).config`).
            cache: its training cache or a copy of it, if that is no longer at `config.cache`.

        Raises:
            StoreError: the cache cannot be read.
        """
        cache = Cache(config.cache) if cache is None else cache
        self.split = config.images
        rows = cache.usable_rows([teacher.name for teacher in config.teachers])
        if self.split is not None:
            # Images appended after the run began were not part of it.
            rows = rows[rows < self.split.in_cache]
        digests = cache.digests[rows]
        self._trained_on = _keys(digests[~self.held_out(digests)])

    def trained_on(self, digests: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return (n,) booleans: whether the student was trained on the files with these digests (n, 16)."""
        return np.isin(_keys(digests), self._trained_on)

    def held_out(self, digests: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return (n,) booleans: whether the run's rule holds out the files with these digests (n, 16), in any cache."""
        return np.zeros(len(digests), np.bool_) if self.split is None else self.split.is_held_out(digests)


def _keys(digests: NDArray[np.uint8]) -> NDArray[np.void]:
    """Return digests (n, 16) as (n,) values that compare as a whole."""
    # One void of 16 bytes a digest, which np.isin compares as one value.
    return np.ascontiguousarray(digests).view(np.dtype((np.void, DIGEST_BYTES))).ravel()
