"""Samplers: the order of images as a pure function of (seed, epoch, position), whatever the number of readers.

`FullSampler` shuffles all images of an epoch. `BlockSampler` shuffles the shards and, within a few of them at a time, their
images, so that an object store is read a shard at a time. Each process then reads its own shards.
"""

import bisect
import functools
import threading
from typing import Protocol, final

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import ConfigError

_ORDER = 0
"""Number of a random stream derived from the recipe's seed."""

Seed = tuple[int, ...]


class Sampler(Protocol):
    """The rows of each batch. Every image comes once an epoch; an epoch may begin inside a batch."""

    def rows(self, number: int, first: int, last: int) -> NDArray[np.int64]:
        """Return the rows of the images [first, last) of batch `number`."""
        ...


@final
class FullSampler:
    """A shuffle of all images in every epoch.

    Args:
        rows: all rows to sample.
        seed: seed of this sampler.
        batch_images: images in a batch; batches continue from one epoch into the next.
    """

    def __init__(self, rows: NDArray[np.int64], seed: Seed, batch_images: int) -> None:
        self._rows, self._seed, self._batch_images = rows, seed, batch_images
        # A batch may see the end of one epoch and the beginning of the next; threads work on neighbouring batches.
        self._permutation = functools.lru_cache(maxsize=3)(self._permuted)

    def rows(self, number: int, first: int, last: int) -> NDArray[np.int64]:
        """Return the rows of the images [first, last) of batch `number`."""
        start = number * self._batch_images
        epochs, positions = np.divmod(np.arange(start + first, start + last), len(self._rows))
        rows = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            rows[in_epoch] = self._rows[self._permutation(int(epoch))[positions[in_epoch]]]
        return rows

    def _permuted(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng((*self._seed, _ORDER, epoch)).permutation(len(self._rows))


@final
class BlockSampler:
    """A shuffle of the shards, and of the images within a window of shards.

    A reader's epoch is its shards in a new order. Readers with fewer images begin their next epoch earlier.

    Args:
        rows: all rows to sample, sorted.
        shard_images: images in a shard.
        seed: seed of this sampler.
        batch_images: images in a batch, of all readers.
        window: shards whose images are shuffled together.
        readers: processes that share a batch, each with its own shards.

    Raises:
        ConfigError: there are fewer shards than readers.
    """

    def __init__(
        self, rows: NDArray[np.int64], shard_images: int, seed: Seed, batch_images: int, *, window: int, readers: int
    ) -> None:
        shards = rows // shard_images
        # Rows are sorted, so that a shard's rows lie side by side.
        starts = np.flatnonzero(np.diff(shards, prepend=-1))
        self._by_shard = np.split(rows, starts[1:])
        if len(self._by_shard) < readers:
            raise ConfigError(
                f"{readers} processes cannot share {len(self._by_shard)} shards of images: --set shuffle=full, or build with "
                "smaller --shard-images"
            )
        self._seed, self._batch_images, self._window, self._readers = seed, batch_images, window, readers
        # Of each reader, the positions in its stream of images at which its epochs begin; extended as far as needed.
        self._starts: list[list[int]] = [[0] for _ in range(readers)]
        self._growing = threading.Lock()
        self._epoch_rows = functools.lru_cache(maxsize=3)(self._shuffled)

    def rows(self, number: int, first: int, last: int) -> NDArray[np.int64]:
        """Return the rows of the images [first, last) of batch `number`, of one reader or of several whole ones.

        Raises:
            ConfigError: the images are part of one reader's and part of another's.
        """
        share = self._batch_images // self._readers
        reader = first // share
        if last > (reader + 1) * share:
            if first % share == 0 and last % share == 0:
                return np.concatenate([self.rows(number, begin, begin + share) for begin in range(first, last, share)])
            raise ConfigError(f"images {first} to {last} of a batch are not those of one of {self._readers} readers")
        start = number * share + first % share
        epoch = self._epoch_of(reader, start)
        start -= self._starts[reader][epoch]
        pieces: list[NDArray[np.int64]] = []
        num_missing = last - first
        while num_missing > 0:  # a batch may continue into the reader's next epoch
            pieces.append(self._epoch_rows(reader, epoch)[start : start + num_missing])
            num_missing -= len(pieces[-1])
            start, epoch = 0, epoch + 1
        return np.concatenate(pieces)

    def _epoch_of(self, reader: int, position: int) -> int:
        """Return the epoch that a position in the reader's stream lies in. Epochs differ in length, as shards do."""
        starts = self._starts[reader]
        with self._growing:
            while starts[-1] <= position:
                shards = self._shards_of(reader, len(starts) - 1)
                starts.append(starts[-1] + sum(len(self._by_shard[shard]) for shard in shards))
        return bisect.bisect_right(starts, position) - 1

    def _shards_of(self, reader: int, epoch: int) -> NDArray[np.int64]:
        # All readers draw the same permutation, and each takes every n-th shard: no shard is read twice in an epoch.
        rng = np.random.default_rng((*self._seed, _ORDER, epoch))
        return rng.permutation(len(self._by_shard))[reader :: self._readers]

    def _shuffled(self, reader: int, epoch: int) -> NDArray[np.int64]:
        shards = self._shards_of(reader, epoch)
        rng = np.random.default_rng((*self._seed, _ORDER, epoch, reader))
        blocks = [
            rng.permutation(np.concatenate([self._by_shard[shard] for shard in shards[begin : begin + self._window]]))
            for begin in range(0, len(shards), self._window)
        ]
        return np.concatenate(blocks)
