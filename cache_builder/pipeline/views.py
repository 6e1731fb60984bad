"""What a teacher is shown: images, and extra views of them, read, decoded and resized in threads."""

from collections.abc import Collection, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cache_builder.pipeline.image_access import ImageAccess
from cache_builder.pipeline.preprocess import view_pixels
from cache_builder.pipeline.scan import ScanResult, look
from cache_builder.pipeline.timing import StageSeconds, Stopwatch
from radio_cache.errors import ImageError, SourceError, UnreadableImageError
from radio_cache.format.schema import TeacherSpec
from radio_cache.geometry.crops import ViewGeometry, valid_hw, valid_tokens
from radio_cache.geometry.views import View, draw_view
from radio_cache.images.decode import cut_view, decode_image
from radio_cache.prefetch.ordered import ahead
from radio_cache.reader import Cache, digest

ViewRequest = tuple[int, tuple[int, ...]]
"""A row, and the numbers of its views that are wanted: an image is decoded once for all of them."""


class TeacherView(NamedTuple):
    """One view of the image in a row of the cache, in the teacher's input size: pixels (h, w, 3)."""

    row: int
    view: View
    pixels: NDArray[np.uint8]

    def valid_hw(self, geometry: ViewGeometry) -> tuple[int, int]:
        """Height and width in input pixels of what is no padding."""
        return valid_hw(self.view.image_hw, geometry)

    def valid_tokens(self, geometry: ViewGeometry) -> NDArray[np.bool_]:
        """(grid_h, grid_w): tokens that show the view; a rectangle from the top left."""
        return valid_tokens(self.view.image_hw, geometry)


def shown(cache: Cache, access: ImageAccess, spec: TeacherSpec, job: ViewRequest) -> list[TeacherView]:
    """What a teacher is shown of one image. Raises SourceError if it is another file now than when it was checked, or cannot
    be read now; and as `ImageAccess` does."""
    row, _ = job
    key = cache.index.key(row)
    try:
        data = access.file(row)
        if digest(data) != cache.digests[row].tobytes():
            raise ImageError(f"{key} has changed since the cache was built")
        image = access.decode(row, data, lambda file: decode_image(file, max_pixels=cache.meta.max_pixels))
        return access.with_memory(row, lambda: _views(spec, job, image))
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
    access: ImageAccess, spec: TeacherSpec, job: ViewRequest
) -> tuple[list[TeacherView], ScanResult]:
    """What a teacher is shown of an image that nobody has looked at yet, nothing if it cannot be used; and what was found.

    Raises SourceError for an image that is fine and too long for this teacher; and as `ImageAccess` does.
    """
    found, image = look(access, job[0])
    try:
        return [] if image is None else access.with_memory(job[0], lambda: _views(spec, job, image)), found
    except ImageError as exc:
        key = access.cache.index.key(job[0])
        raise SourceError(f"image {key}, for teacher '{spec.name}': {exc}. Leave it out: --filter '!{key}'") from exc


def _views(spec: TeacherSpec, job: ViewRequest, image: Image.Image) -> list[TeacherView]:
    row, numbers = job
    views = [draw_view(spec.view_sampling, row, number, (image.height, image.width)) for number in numbers]
    return [TeacherView(row, view, view_pixels(cut_view(image, view), spec.geometry)) for view in views]


def prefetch_views(
    cache: Cache,
    spec: TeacherSpec,
    jobs: Iterable[ViewRequest],
    pool: ThreadPoolExecutor,
    stages: StageSeconds,
    *,
    depth: int,
    unseen: Collection[int] = (),
    access: ImageAccess | None = None,
) -> Generator[TeacherView]:
    """What the teacher is shown of these images, in order, made ahead in the pool. depth: images, about. unseen: shards that
    were not scanned yet."""

    reads = access or ImageAccess(cache)

    def timed(job: ViewRequest) -> list[TeacherView]:
        with Stopwatch(stages, "decode"):
            first = job[0] // cache.meta.shard_images in unseen
            return scan_and_load_views(reads, spec, job)[0] if first else shown(cache, reads, spec, job)

    for some in ahead(pool, timed, jobs, depth=depth):
        yield from some
