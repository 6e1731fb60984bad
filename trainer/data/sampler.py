"""The order of the images: pure functions of (seed, epoch, position), the same whoever reads them and however many.

`FullOrder` shuffles all images of an epoch. `BlockOrder` shuffles the shards, and within a few of them at a time their
images, so that an object store is read a shard at a time; each process reads shards of its own.
"""

import bisect
import functools
import threading
from typing import Protocol, final

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import ConfigError

_ORDER = 0
"""A stream of random numbers drawn from the recipe's seed."""

Seed = tuple[int, ...]


class Sampler(Protocol):
    """Which images a batch shows. Every image comes once an epoch; an epoch may begin inside a batch."""

    def rows(self, number: int, first: int, last: int) -> NDArray[np.int64]:
        """Rows of the images [first, last) of batch `number`."""
        ...


@final
class FullSampler:
    """rows: all images. seed: of this order; batches of `batch_images` go through epoch after epoch."""

    def __init__(self, rows: NDArray[np.int64], seed: Seed, batch_images: int) -> None:
        self._rows, self._seed, self._batch_images = rows, seed, batch_images
        # A batch may see the end of one epoch and the beginning of the next; threads work on neighbouring batches.
        self._permutation = functools.lru_cache(maxsize=3)(self._permuted)

    def rows(self, number: int, first: int, last: int) -> NDArray[np.int64]:
        start = number * self._batch_images
        epochs, places = np.divmod(np.arange(start + first, start + last), len(self._rows))
        found = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = self._rows[self._permutation(int(epoch))[places[here]]]
        return found

    def _permuted(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng((*self._seed, _ORDER, epoch)).permutation(len(self._rows))


@final
class BlockSampler:
    """shards: of each image, ascending, as `rows` is. readers: processes that share a batch, each with shards of its own.

    A reader's epoch is its shards in a new order, `window` of them shuffled together. Readers with fewer images come round
    sooner. Raises ConfigError for fewer shards than readers.
    """

    def __init__(
        self, rows: NDArray[np.int64], shard_images: int, seed: Seed, batch_images: int, *, window: int, readers: int
    ) -> None:
        shards = rows // shard_images
        starts = np.flatnonzero(np.diff(shards, prepend=-1))
        self._by_shard = np.split(rows, starts[1:])
        if len(self._by_shard) < readers:
            raise ConfigError(
                f"{readers} processes cannot share {len(self._by_shard)} shards of images: --set shuffle=full, or build with "
                "smaller --shard-images"
            )
        self._seed, self._batch_images, self._window, self._readers = seed, batch_images, window, readers
        self._starts: list[list[int]] = [[0] for _ in range(readers)]  # of each reader's epochs, in its images
        self._growing = threading.Lock()
        self._epoch_rows = functools.lru_cache(maxsize=3)(self._shuffled)

    def rows(self, number: int, first: int, last: int) -> NDArray[np.int64]:
        share = self._batch_images // self._readers
        reader = first // share
        if last > (reader + 1) * share:
            if first % share == 0 and last % share == 0:
                return np.concatenate([self.rows(number, at, at + share) for at in range(first, last, share)])
            raise ConfigError(f"images {first} to {last} of a batch are not those of one of {self._readers} readers")
        start = number * share + first % share
        epoch = self._epoch_of(reader, start)
        start -= self._starts[reader][epoch]
        found: list[NDArray[np.int64]] = []
        wanted = last - first
        while wanted > 0:
            found.append(self._epoch_rows(reader, epoch)[start : start + wanted])
            wanted -= len(found[-1])
            start, epoch = 0, epoch + 1
        return np.concatenate(found)

    def _epoch_of(self, reader: int, position: int) -> int:
        """The reader's epoch that an image of its endless stream lies in; epochs differ in length by the shards they have."""
        starts = self._starts[reader]
        with self._growing:
            while starts[-1] <= position:
                mine = self._shards_of(reader, len(starts) - 1)
                starts.append(starts[-1] + sum(len(self._by_shard[shard]) for shard in mine))
        return bisect.bisect_right(starts, position) - 1

    def _shards_of(self, reader: int, epoch: int) -> NDArray[np.int64]:
        rng = np.random.default_rng((*self._seed, _ORDER, epoch))
        return rng.permutation(len(self._by_shard))[reader :: self._readers]

    def _shuffled(self, reader: int, epoch: int) -> NDArray[np.int64]:
        mine = self._shards_of(reader, epoch)
        rng = np.random.default_rng((*self._seed, _ORDER, epoch, reader))
        blocks = [
            rng.permutation(np.concatenate([self._by_shard[shard] for shard in mine[at : at + self._window]]))
            for at in range(0, len(mine), self._window)
        ]
        return np.concatenate(blocks)
