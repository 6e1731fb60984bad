"""The pixels of a cache's images, in batches: files are read and decoded in threads, ahead of whoever uses them."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evals.errors import EvalError
from radio_cache.errors import ImageError
from radio_cache.images import decode_image
from radio_cache.prefetch import ahead
from radio_cache.reader import Cache, Rows

_BATCHES_AHEAD = 3

ToPixels = Callable[[Image.Image], NDArray[np.uint8]]
"""An upright RGB image to the (h, w, 3) pixels a model sees; the size is the same for every image."""


def decoded_image(cache: Cache, row: int) -> Image.Image:
    """The image of one row, upright and RGB. Raises EvalError naming the image and the reason."""
    try:
        return decode_image(cache.read_file(row), max_pixels=cache.meta.max_pixels)
    except ImageError as exc:
        raise EvalError(f"image {cache.index.key(row)} of {cache.url}: {exc}") from exc


def pixel_batches(cache: Cache, rows: Rows, to_pixels: ToPixels, *, batch_images: int) -> Iterator[NDArray[np.uint8]]:
    """Yield (b, h, w, 3) pixels of the rows, in order; b is `batch_images`, the last batch may be smaller.

    Memory stays at a few batches however many rows there are. Raises EvalError as `decoded_image` does.
    """
    # The index is read once, here: threads that all find it missing would each read it.
    _ = cache.index, cache.digests
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="pixels") as pool:
        depth = _BATCHES_AHEAD * batch_images
        batch: list[NDArray[np.uint8]] = []
        for pixels in ahead(pool, lambda row: to_pixels(decoded_image(cache, row)), map(int, rows), depth=depth):
            batch.append(pixels)
            if len(batch) == batch_images:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)
