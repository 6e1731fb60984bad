"""The choice and the order of the images that a cache uses."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import translate

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Filters, shuffling and a limit, applied in this order to the keys of the listed images.

    Raises:
        ConfigError: the limit is below 1, or a filter is empty.
    """

    filters: tuple[str, ...] = ()
    """Shell patterns of keys to keep, or, after "!", to leave out. `*` matches any text, slashes included."""

    shuffle_seed: int | None = None
    """Seed of the order of rows; None keeps the order of the sources."""

    limit: int | None = None
    """Number of images to use, after filtering and shuffling; None uses all."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit must be at least 1, not {self.limit}")
        empty = [pattern for pattern in self.filters if not pattern.removeprefix("!")]
        if empty:
            raise ConfigError(
                f"--filter '{empty[0]}' is empty: pass a pattern such as 'cat/*', or '!*/draft-*' to leave images out"
            )

    def rows(self, keys: Sequence[str]) -> tuple[NDArray[np.int64], int]:
        """Return the positions of the selected keys in the order of the cache's rows.

        The same keys and settings give the same order on any machine, with any version of any library.

        Args:
            keys: keys of all listed images.

        Returns:
            The positions, and the number of keys that pass the filters.
        """
        rows = np.arange(len(keys))
        if self.filters:
            keep, drop = _pattern(self.filters, ""), _pattern(self.filters, "!")
            rows = np.array(
                [row for row, key in enumerate(keys) if (not keep or keep(key)) and not (drop and drop(key))], np.int64
            )
        if self.shuffle_seed is not None:
            # Sorting by a keyed hash instead of a random generator: the streams of generators may change between versions,
            # and an image keeps its place relative to the others when images are added.
            salt = str(self.shuffle_seed).encode()
            hashes = [
                hashlib.blake2b(keys[row].encode("utf-8", "surrogateescape"), digest_size=8, key=salt).digest()
                for row in rows.tolist()
            ]
            # ">u8": the byte order is fixed, because it decides the order of rows.
            rows = rows[np.argsort(np.frombuffer(b"".join(hashes), ">u8"), kind="stable")]
        return rows[: self.limit], len(rows)


def _pattern(filters: Sequence[str], sign: str) -> Callable[[str], object] | None:
    """Return a function that matches any filter with the sign ("" or "!"); None if there is no such filter."""
    patterns = [pattern.removeprefix("!") for pattern in filters if pattern.startswith("!") == bool(sign)]
    # One regular expression for all patterns: a pass over a million keys for each would take seconds.
    return re.compile("|".join(translate(pattern) for pattern in patterns)).match if patterns else None
