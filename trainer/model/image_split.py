"""A student's record of the images it was trained on and of those held out. Every export contains it."""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import ConfigError

DIGEST_BYTES = 16
_DIGEST = re.compile(f"[0-9a-f]{{{2 * DIGEST_BYTES}}}")


@dataclass(frozen=True, kw_only=True)
class ImageSplit:
    """The division of a cache's images into trained-on and held-out ones, decided by the digest of each image file.

    Attributes:
        in_cache: images of the cache when training began. Images added later have higher rows, and
            the student was not trained on them.
        trained_on: number of images that it was trained on.
        held_out: number of images that it could have been trained on, and was not.
        held_out_to: greatest digest that is held out, 32 hexadecimal digits; None if no image is.
    """

    in_cache: int
    trained_on: int
    held_out: int
    held_out_to: str | None

    def __post_init__(self) -> None:
        for name in ("in_cache", "trained_on", "held_out"):
            number: object = getattr(self, name)
            if type(number) is not int or number < 0:
                raise ConfigError(f"images.{name} is a number of images, not {number!r:.50}")
        limit = self.held_out_to
        if limit is not None and not _DIGEST.fullmatch(str(limit)):
            raise ConfigError(
                f"images.held_out_to is a digest of {2 * DIGEST_BYTES} hexadecimal digits, not {limit!r:.50}"
            )

    def is_held_out(self, digests: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return (n,) whether images with these digests (n, 16) are held out; one that is 0, of no file, is not."""
        if self.held_out_to is None:
            return np.zeros(len(digests), np.bool_)
        limit_high, limit_low = np.frombuffer(bytes.fromhex(self.held_out_to), ">u8")
        # Byte by byte from the first, as two big-endian halves.
        high, low = np.ascontiguousarray(digests, np.uint8).reshape(-1, DIGEST_BYTES).view(">u8").T
        # Zero is the digest of an image without a file, which no split can place.
        return ((high < limit_high) | ((high == limit_high) & (low <= limit_low))) & ((high > 0) | (low > 0))
