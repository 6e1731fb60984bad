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
                f"--fraction {self.fraction:g}: a fraction of the images is above 0 and at most 1, such as 0.1"
            )
        if self.fraction is not None and self.limit is not None:
            raise ConfigError("--fraction and --limit both set the number of images: use only one of them")
        if self.fidelity is not None and self.packing is None:
            raise ConfigError("--fidelity applies only to transcoding: add --packing, or leave --fidelity out")
        if self.fidelity is not None:
            # Constructed only for its own validation, so that both report one bound.
            CodecRequest(fidelity=self.fidelity)
        if len(set(self.teachers)) < len(self.teachers):
            raise ConfigError(
                f"--teacher {next(t for t in self.teachers if self.teachers.count(t) > 1)} is given twice"
            )
        if self.threads < 1:
            raise ConfigError(f"threads must be at least 1, not {self.threads}")
        # Validates the patterns and the limit before the source is opened.
        Selection(filters=self.filters, limit=self.limit)

    def rows(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """Return the rows of the images to copy, ascending.

        Args:
            keys: of all images of the source, by row.

        Raises:
            ConfigError: if the filters leave no image.
        """
        if not self.filters and self.fraction is None:
            # Matching millions of keys takes seconds, and is not needed here.
            return np.arange(len(keys))[: self.limit]
        chosen, num_matches = Selection(filters=self.filters, limit=self.limit).rows(keys)
        if num_matches == 0:
            raise ConfigError(
                f"--filter {' '.join(self.filters)}: none of {len(keys)} images matches, such as {keys[0]}"
            )
        if self.fraction is None:
            return chosen
        count = max(1, round(self.fraction * num_matches))
        # The seeded order comes first and the count cuts it, so that smaller fractions are subsets of larger ones.
        return np.sort(Selection(filters=self.filters, shuffle_seed=self.seed, limit=count).rows(keys)[0])

    def describe(self) -> str:
        """Return a description of the selected images."""
        phrases = [f"--filter '{pattern}'" for pattern in self.filters]
        if self.fraction is not None:
            phrases.append(f"a sample of {self.fraction:g} by seed {self.seed}")
        if self.limit is not None:
            phrases.append("the first of them")
        return ", ".join(phrases)
