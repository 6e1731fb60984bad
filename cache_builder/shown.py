"""What a teacher is shown: images, and extra views of them, read, decoded and resized in threads."""

from collections.abc import Collection, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cache_builder.preprocess import view_pixels
from cache_builder.scan import Look, look
from cache_builder.stages import StageSeconds, Stopwatch
from radio_cache.crops import ViewGeometry, valid_hw, valid_tokens
from radio_cache.errors import ImageError, SourceError
from radio_cache.extra_views import View, draw_view
from radio_cache.images import cut_view, decode_image
from radio_cache.prefetch import ahead
from radio_cache.reader import Cache
from radio_cache.schema import TeacherSpec

Job = tuple[int, tuple[int, ...]]
"""A row, and the numbers of its views that are wanted: an image is decoded once for all of them."""


class Shown(NamedTuple):
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


def shown(cache: Cache, spec: TeacherSpec, job: Job) -> list[Shown]:
    """What a teacher is shown of one image. Raises SourceError if it is another file now than when it was checked."""
    row, _ = job
    try:
        image = decode_image(cache.read_file(row), max_pixels=cache.meta.max_pixels)
        return _views(spec, job, image)
    except ImageError as exc:
        raise SourceError(
            f"image {cache.index.key(row)} was fine when the images were checked, and now: {exc}. "
            "Put it back and run the same command again, or build a new cache"
        ) from exc


def first_shown(cache: Cache, spec: TeacherSpec, job: Job) -> tuple[list[Shown], Look]:
    """What a teacher is shown of an image that nobody has looked at yet, nothing if it cannot be used; and what was found.

    Raises SourceError for an image that is fine and too long for this teacher.
    """
    found, image = look(cache, job[0])
    try:
        return [] if image is None else _views(spec, job, image), found
    except ImageError as exc:
        key = cache.index.key(job[0])
        raise SourceError(f"image {key}, for teacher '{spec.name}': {exc}. Leave it out: --filter '!{key}'") from exc


def _views(spec: TeacherSpec, job: Job, image: Image.Image) -> list[Shown]:
    row, numbers = job
    views = [draw_view(spec.view_sampling, row, number, (image.height, image.width)) for number in numbers]
    return [Shown(row, view, view_pixels(cut_view(image, view), spec.geometry)) for view in views]


def shown_ahead(
    cache: Cache, spec: TeacherSpec, jobs: Iterable[Job], pool: ThreadPoolExecutor, stages: StageSeconds, *, depth: int,
    unseen: Collection[int] = (),
) -> Generator[Shown]:  # fmt: skip
    """What the teacher is shown of these images, in order, made ahead in the pool. depth: images, about. unseen: shards that
    were not scanned yet."""

    def timed(job: Job) -> list[Shown]:
        with Stopwatch(stages, "decode"):
            first = job[0] // cache.meta.shard_images in unseen
            return first_shown(cache, spec, job)[0] if first else shown(cache, spec, job)

    for some in ahead(pool, timed, jobs, depth=depth):
        yield from some
