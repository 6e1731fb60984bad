"""The configuration of a copy."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache_builder.sources import Selection
from radio_cache.codecs.calibrate import CodecRequest
from radio_cache.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CopyConfig:
    """The configuration of a copy. Rows keep their order.

    Attributes:
        source: path or URL of the cache to copy.
        target: path or URL of the copy.
        teachers: names of teachers, each at all its input sizes; () for all.
        filters: patterns of keys to keep, or, after "!", to leave out.
        fraction: share of the remaining images, sampled by `seed` and the keys alone, so that smaller fractions are parts of
            larger ones.
        seed: of the sample.
        limit: number of first images.
        packing: of klt teachers; None keeps the stored one.
        fidelity: mean cosine with the stored maps after transcoding; None derives it from their recorded fidelity.
        threads: shards copied at a time.
    """

    source: str | Path
    target: str | Path
    teachers: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()
    fraction: float | None = None
    seed: int = 0
    limit: int | None = None
    packing: str | None = None
    fidelity: float | None = None
    threads: int = 2

    def __post_init__(self) -> None:
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ConfigError(
                f"--fraction {self.fraction:g}: a part of the images is above 0 and at most 1, such as 0.1"
            )
        if self.fraction is not None and self.limit is not None:
            raise ConfigError("--fraction and --limit both say how many images: give one")
        if self.fidelity is not None and self.packing is None:
            raise ConfigError(
                "--fidelity is what encoding again keeps: it needs --packing, without which nothing is encoded"
            )
        if self.fidelity is not None:
            CodecRequest(fidelity=self.fidelity)
        if len(set(self.teachers)) < len(self.teachers):
            raise ConfigError(
                f"--teacher {next(t for t in self.teachers if self.teachers.count(t) > 1)} is given twice"
            )
        if self.threads < 1:
            raise ConfigError(f"threads must be at least 1, not {self.threads}")
        Selection(filters=self.filters, limit=self.limit)

    def rows(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """Numbers of the images to copy, ascending. Raises ConfigError if there are none."""
        if not self.filters and self.fraction is None:
            return np.arange(len(keys))[: self.limit]  # without a look at millions of keys
        chosen, num_matches = Selection(filters=self.filters, limit=self.limit).rows(keys)
        if num_matches == 0:
            raise ConfigError(
                f"--filter {' '.join(self.filters)}: none of {len(keys)} images is left, such as {keys[0]}"
            )
        if self.fraction is None:
            return chosen
        count = max(1, round(self.fraction * num_matches))
        return np.sort(Selection(filters=self.filters, shuffle_seed=self.seed, limit=count).rows(keys)[0])

    def describe(self) -> str:
        """Return a description of the selected images."""
        phrases = [f"--filter '{pattern}'" for pattern in self.filters]
        if self.fraction is not None:
            phrases.append(f"a sample of {self.fraction:g} by seed {self.seed}")
        if self.limit is not None:
            phrases.append("the first of them")
        return ", ".join(phrases)
