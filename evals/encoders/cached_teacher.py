"""A teacher's summaries from a cache: no model runs, unless the images come from elsewhere."""

from collections.abc import Iterator
from typing import final

import numpy as np

from evals.encoders.base import OWN, Block, Encoder, LiveEncoder, OnImages, size_phrase
from evals.errors import EvalError
from evals.shared.image_set import ImageSet
from radio_cache.reader import CachedTeacher

# 16,384 summaries of 1,280 values are 84 MB in float32: small, and few reads per shard.
_BLOCK_ROWS = 1 << 14


@final
class CachedTeacherEncoder(Encoder):
    """A teacher of a cache.

    Args:
        teacher: with summaries.
        live: the same teacher as a model, for images that are in no cache.

    Raises:
        EvalError: for a teacher without summaries.
    """

    def __init__(self, teacher: CachedTeacher, *, live: LiveEncoder | None = None) -> None:
        if teacher.spec.summary_dim is None:
            raise EvalError(f"teacher '{teacher.name}' has no summary, only maps: it cannot be compared by k-NN")
        super().__init__(
            name=teacher.name,
            kind="teacher",
            spaces=(OWN,),
            runs_a_model=live is not None,
            description=f"teacher, from the cache, {size_phrase(teacher.spec.geometry.input_hw)}",
        )
        self._live = live

    def blocks(self, images: ImageSet, *, on_images: OnImages | None = None) -> Iterator[Block]:
        """Yield the cached summaries, or those of the live teacher for images that are in no cache."""
        cache = images.cache
        # A folder has no cached features, although its files may be those of the cache.
        if cache is None and self._live is not None:
            yield from self._live.blocks(images, on_images=on_images)
            return
        if cache is None:
            raise EvalError(f"{images.location} is no cache")
        if self.name not in cache.teachers:
            cached_names = ", ".join(cache.teachers) or "none"
            raise EvalError(f"{images.location} has no teacher '{self.name}': it has {cached_names}")
        # The teacher of this cache, not the one given at construction: bank and queries may lie in different caches.
        teacher = cache.teachers[self.name]
        for first in range(0, len(images), _BLOCK_ROWS):
            rows = images.rows[first : first + _BLOCK_ROWS]
            # Usable rows of a cache are known beforehand, so no position is left out.
            yield Block(np.arange(first, first + len(rows)), {OWN: teacher.summaries(rows)})
            if on_images is not None:
                on_images(len(rows))
