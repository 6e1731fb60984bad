"""The pixels of images in batches: files are read and decoded in threads, ahead of whoever uses them."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evals.shared.image_set import ImageSet
from radio_cache.prefetch.ordered import ahead

_BATCHES_AHEAD = 3

ToPixels = Callable[[Image.Image], NDArray[np.uint8]]
"""An upright RGB image to the (h, w, 3) pixels a model sees; the size is the same for every image."""


class PixelBatch(NamedTuple):
    """positions (b,) in the image set; pixels (b, h, w, 3) uint8; images_hw: height and width of each image, pixels."""

    positions: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    images_hw: list[tuple[int, int]]


class _One(NamedTuple):
    position: int
    pixels: NDArray[np.uint8]
    image_hw: tuple[int, int]


def pixel_batches(images: ImageSet, to_pixels: ToPixels, *, batch_images: int) -> Iterator[PixelBatch]:
    """Batches of the images in order, without those that are left out; the last one may be smaller.

    Memory stays at a few batches however many images there are. Raises EvalError as `ImageSet.decoded` does.
    """

    def one(position: int) -> _One | None:
        image = images.decoded(position)
        return None if image is None else _One(position, to_pixels(image), (image.height, image.width))

    # What images share is read once, here: threads that all find it missing would each read it.
    if len(images):
        images.key(0)
        if images.cache is not None:
            _ = images.cache.index.container, images.cache.index.offset, images.cache.index.length, images.cache.digests
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="pixels") as pool:
        batch: list[_One] = []
        for made in ahead(pool, one, range(len(images)), depth=_BATCHES_AHEAD * batch_images):
            batch += [] if made is None else [made]
            if len(batch) == batch_images:
                yield _stacked(batch)
                batch = []
        if batch:
            yield _stacked(batch)


def _stacked(batch: list[_One]) -> PixelBatch:
    return PixelBatch(
        np.array([one.position for one in batch], np.int64),
        np.stack([one.pixels for one in batch]),
        [one.image_hw for one in batch],
    )
