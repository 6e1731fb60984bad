"""Views of a teacher: images, and random crops of them, read, decoded and resized in threads."""

from collections.abc import Callable, Collection, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cache_builder.pipeline.image_access import ImageAccess
from cache_builder.pipeline.preprocess import view_pixels
from cache_builder.pipeline.scan import ScanResult, scan_image
from cache_builder.pipeline.timing import StageSeconds, Stopwatch
from radio_cache.errors import ImageError, SourceError, UnreadableImageError
from radio_cache.format.schema import TeacherSpec
from radio_cache.geometry.crops import ViewGeometry, valid_hw, valid_tokens
from radio_cache.geometry.views import View, draw_view
from radio_cache.images.decode import cut_view, decode_image
from radio_cache.prefetch.ordered import prefetch_map
from radio_cache.reader import Cache, digest

ViewRequest = tuple[int, tuple[int, ...]]
"""A row, and the numbers of its views. An image is decoded once for all of its views."""


class TeacherView(NamedTuple):
    """One view of the image in a row of the cache, in the teacher's input size: pixels (h, w, 3)."""

    row: int
    view: View
    pixels: NDArray[np.uint8]

    def valid_hw(self, geometry: ViewGeometry) -> tuple[int, int]:
        """Return height and width, in input pixels, of the part that is not padding."""
        return valid_hw(self.view.image_hw, geometry)

    def valid_tokens(self, geometry: ViewGeometry) -> NDArray[np.bool_]:
        """Return a mask (grid_h, grid_w) of the tokens that show the image: a rectangle from the top left."""
        return valid_tokens(self.view.image_hw, geometry)


LoadedViews = tuple[list[TeacherView], ScanResult | None]
"""Views of one image, none if it cannot be used, and its scan result if it had not been scanned before."""


def load_views(cache: Cache, access: ImageAccess, spec: TeacherSpec, request: ViewRequest) -> list[TeacherView]:
    """Return the requested views of an image that has been scanned.

    Raises:
        SourceError: the image differs from the one that was scanned, or cannot be read now; and as `ImageAccess` does.
    """
    row, _ = request
    key = cache.index.key(row)
    try:
        data = access.file(row)
        # A changed image would silently get features beside the old digest.
        if digest(data) != cache.digests[row].tobytes():
            raise ImageError(f"{key} has changed since the cache was built")
        image = access.decode(row, data, lambda file: decode_image(file, max_pixels=cache.meta.max_pixels))
        return access.with_memory(row, lambda: _cut_views(spec, request, image))
    except UnreadableImageError as exc:
        raise SourceError(
            f"image {key} was fine when the images were checked, and now: {exc}. Make it readable again, or put it back, and run "
            "the same command"
        ) from exc
    except ImageError as exc:
        raise SourceError(
            f"image {key} was fine when the images were checked, and now: {exc}. "
            "Put back the file that was there, and run the same command again; or build from the new images into another --out"
        ) from exc


def scan_and_load_views(
    access: ImageAccess, spec: TeacherSpec, request: ViewRequest
) -> tuple[list[TeacherView], ScanResult]:
    """Return the requested views of an image that has not been scanned, none if it cannot be used, and its scan result.

    Raises:
        SourceError: the image is usable, but too long and thin for this teacher; and as `ImageAccess` does.
    """
    scan_result, image = scan_image(access, request[0])
    try:
        views = [] if image is None else access.with_memory(request[0], lambda: _cut_views(spec, request, image))
    except ImageError as exc:
        key = access.cache.index.key(request[0])
        raise SourceError(f"image {key}, for teacher '{spec.name}': {exc}. Leave it out: --filter '!{key}'") from exc
    return views, scan_result


def _cut_views(spec: TeacherSpec, request: ViewRequest, image: Image.Image) -> list[TeacherView]:
    row, numbers = request
    # Drawn from seed, row and number alone, so that every build draws the same.
    views = [draw_view(spec.view_sampling, row, number, (image.height, image.width)) for number in numbers]
    return [TeacherView(row, view, view_pixels(cut_view(image, view), spec.geometry)) for view in views]


def view_loader(
    cache: Cache, access: ImageAccess, spec: TeacherSpec, unscanned: Collection[int], stages: StageSeconds
) -> Callable[[ViewRequest], LoadedViews]:
    """Return a function that reads, decodes and resizes the image of a request, for any thread.

    Args:
        cache: the cache whose images are read.
        access: reads the files.
        spec: the teacher's spec.
        unscanned: shards that were not scanned yet, whose images are scanned on the way.
        stages: receives the time as `decode`.
    """

    def load(request: ViewRequest) -> LoadedViews:
        with Stopwatch(stages, "decode"):
            # Decoding once for scan and teacher saves a pass over all images.
            if request[0] // cache.meta.shard_images in unscanned:
                return scan_and_load_views(access, spec, request)
            return load_views(cache, access, spec, request), None

    return load


def prefetch_views(
    cache: Cache,
    spec: TeacherSpec,
    requests: Iterable[ViewRequest],
    pool: ThreadPoolExecutor,
    stages: StageSeconds,
    *,
    depth: int,
    unscanned: Collection[int] = (),
    access: ImageAccess | None = None,
) -> Generator[TeacherView]:
    """Yield the requested views in order, decoded ahead in `pool`.

    Args:
        cache: the cache whose images are read.
        spec: the teacher's spec.
        requests: rows and view numbers.
        pool: threads that decode.
        stages: receives the time as `decode`.
        depth: approximate number of images in flight.
        unscanned: shards that were not scanned yet.
        access: reads the files; None for a new one.
    """
    load = view_loader(cache, access or ImageAccess(cache), spec, unscanned, stages)
    for views, _ in prefetch_map(pool, load, requests, depth=depth):
        yield from views
