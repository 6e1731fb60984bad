"""Decoded images in batches: files are read and decoded in threads, ahead of their use."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evals.shared.image_set import ImageSet
from radio_cache.prefetch.ordered import prefetch_map

# Decoding varies from image to image; three batches even it out.
_BATCHES_AHEAD = 3

ToPixels = Callable[[Image.Image], NDArray[np.uint8]]
"""Maps an upright RGB image to the (h, w, 3) pixels a model sees; the size is the same for every image."""


class PixelBatch(NamedTuple):
    """A batch of preprocessed images.

    Attributes:
        positions: (b,) in the image set.
        pixels: (b, h, w, 3) uint8.
        images_hw: height and width of each original image, pixels.
    """

    positions: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    images_hw: list[tuple[int, int]]


class _ImagePixels(NamedTuple):
    position: int
    pixels: NDArray[np.uint8]
    image_hw: tuple[int, int]


def pixel_batches(images: ImageSet, to_pixels: ToPixels, *, batch_images: int) -> Iterator[PixelBatch]:
    """Yield the images in order, without those that are left out; the last batch may be smaller.

    Memory stays at a few batches however many images there are.

    Args:
        images: to decode.
        to_pixels: preprocessing of the model.
        batch_images: images in a batch.

    Raises:
        EvalError: as `ImageSet.decoded` does.
    """

    def load(position: int) -> _ImagePixels | None:
        image = images.decoded(position)
        return None if image is None else _ImagePixels(position, to_pixels(image), (image.height, image.width))

    # Lazily read arrays of the index are loaded before the threads start: each thread would load them again.
    # An empty set has no key to load.
    if len(images):
        images.key(0)
        if images.cache is not None:
            _ = images.cache.index.container, images.cache.index.offset, images.cache.index.length, images.cache.digests
    # More threads would compete with a model that runs on the same CPU.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="pixels") as pool:
        batch: list[_ImagePixels] = []
        for item in prefetch_map(pool, load, range(len(images)), depth=_BATCHES_AHEAD * batch_images):
            batch += [] if item is None else [item]
            # Counted after images were left out, so that batches are full.
            if len(batch) == batch_images:
                yield _stacked(batch)
                batch = []
        if batch:
            yield _stacked(batch)


def _stacked(batch: list[_ImagePixels]) -> PixelBatch:
    # b x (h, w, 3) -> (b, h, w, 3)
    return PixelBatch(
        np.array([item.position for item in batch], np.int64),
        np.stack([item.pixels for item in batch]),
        [item.image_hw for item in batch],
    )
