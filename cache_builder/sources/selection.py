"""Which of the images found are used, and in what order."""

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
    """filters: patterns of keys to keep, or, after "!", to leave out. shuffle_seed: of the order of rows; None keeps the
    sources' own. limit: keep the first so many, after filtering and shuffling.
    """

    filters: tuple[str, ...] = ()
    shuffle_seed: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit must be at least 1, not {self.limit}")
        empty = [pattern for pattern in self.filters if not pattern.removeprefix("!")]
        if empty:
            raise ConfigError(f"--filter '{empty[0]}': a pattern such as 'cat/*', or '!*/draft-*' to leave images out")

    def rows(self, keys: Sequence[str]) -> tuple[NDArray[np.int64], int]:
        """Numbers of the keys to use, in the order of the cache's rows, and how many there would be without the limit.

        The same keys and settings give the same order on any machine, with any version of any library.

        A pattern is the shell's: * stands for anything, also for slashes.
        """
        rows = np.arange(len(keys))
        if self.filters:
            keep, drop = _pattern(self.filters, ""), _pattern(self.filters, "!")
            rows = np.array(
                [row for row, key in enumerate(keys) if (not keep or keep(key)) and not (drop and drop(key))], np.int64
            )
        if self.shuffle_seed is not None:
            salt = str(self.shuffle_seed).encode()
            draws = [
                hashlib.blake2b(keys[row].encode("utf-8", "surrogateescape"), digest_size=8, key=salt).digest()
                for row in rows.tolist()
            ]
            rows = rows[np.argsort(np.frombuffer(b"".join(draws), ">u8"), kind="stable")]
        return rows[: self.limit], len(rows)


def _pattern(filters: Sequence[str], sign: str) -> Callable[[str], object] | None:
    chosen = [pattern.removeprefix("!") for pattern in filters if pattern.startswith("!") == bool(sign)]
    return re.compile("|".join(translate(pattern) for pattern in chosen)).match if chosen else None
