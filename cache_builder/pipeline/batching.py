"""Between decoding and the teacher: the images of a shard as they come, cut into batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cache_builder.pipeline.image_access import ImageAccess
from cache_builder.pipeline.scan import ScanResult
from cache_builder.pipeline.timing import StageSeconds, Stopwatch
from cache_builder.pipeline.views import TeacherView, ViewRequest, scan_and_load_views, shown
from radio_cache.format.schema import TeacherSpec
from radio_cache.geometry.views import View
from radio_cache.reader import Cache

Decoded = tuple[list[TeacherView], ScanResult | None]
"""What a teacher is shown of one image, nothing if it cannot be used; and what was found, if this was a first look."""


@dataclass(frozen=True)
class Batch:
    """What a teacher is shown at once. last: of its shard; that one is empty where a shard has no image that can be used."""

    shown: list[TeacherView]
    last: bool


@dataclass
class ShardImages:
    """What was decoded of one shard so far: rows that can be used, their views in turn, and what first looks found."""

    rows: list[int] = field(default_factory=list[int])
    views: list[View] = field(default_factory=list[View])
    looks: list[ScanResult] = field(default_factory=list[ScanResult])

    def add(self, decoded: Decoded) -> list[TeacherView]:
        """Note one more image, in row order; returns what the teacher is shown of it."""
        views, look = decoded
        if look is not None:
            self.looks.append(look)
        if views:
            self.rows.append(views[0].row)
            self.views += [one.view for one in views]
        return views

    def batches(
        self, decoded: Iterator[Decoded], count: int, batch_images: int, stages: StageSeconds
    ) -> Iterator[Batch]:
        """The next `count` images, which are this shard's, in batches."""
        waiting: list[TeacherView] = []
        for _ in range(count):
            with Stopwatch(stages, "wait_decode"):
                waiting += self.add(next(decoded))
            while len(waiting) > batch_images:
                yield Batch(waiting[:batch_images], last=False)
                waiting = waiting[batch_images:]
        yield Batch(waiting, last=True)


def decoding(
    cache: Cache, access: ImageAccess, spec: TeacherSpec, unseen: set[int], stages: StageSeconds
) -> Callable[[ViewRequest], Decoded]:
    """Reads, decodes and resizes the image of a job. unseen: shards that were not scanned, whose images are looked at first."""

    def decoded(job: ViewRequest) -> Decoded:
        with Stopwatch(stages, "decode"):
            if job[0] // cache.meta.shard_images in unseen:
                return scan_and_load_views(access, spec, job)
            return shown(cache, access, spec, job), None

    return decoded
