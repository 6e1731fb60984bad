"""Batches: the decoded images of a shard, cut into the batches that a teacher is called with."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from cache_builder.pipeline.scan import ScanResult
from cache_builder.pipeline.timing import StageSeconds, Stopwatch
from cache_builder.pipeline.views import LoadedViews, TeacherView
from radio_cache.geometry.views import View


@dataclass(frozen=True)
class Batch:
    """Views for one call of a teacher. The last batch of a shard is empty if the shard has no usable image."""

    views: list[TeacherView]
    is_last: bool


@dataclass
class ShardImages:
    """Decoded images of one shard so far: usable rows, their views in turn, and results of scanning on the way."""

    rows: list[int] = field(default_factory=list[int])
    views: list[View] = field(default_factory=list[View])
    scan_results: list[ScanResult] = field(default_factory=list[ScanResult])

    def add(self, loaded: LoadedViews) -> list[TeacherView]:
        """Add one more image, in row order, and return its views."""
        views, scan_result = loaded
        if scan_result is not None:
            self.scan_results.append(scan_result)
        if views:
            self.rows.append(views[0].row)
            self.views += [teacher_view.view for teacher_view in views]
        return views

    def batches(
        self, loaded: Iterator[LoadedViews], count: int, batch_images: int, stages: StageSeconds
    ) -> Iterator[Batch]:
        """Yield the next `count` images of `loaded`, which are this shard's, in batches of `batch_images` views."""
        pending: list[TeacherView] = []
        for _ in range(count):
            with Stopwatch(stages, "wait_decode"):
                pending += self.add(next(loaded))
            # A full batch waits until another view follows it: the last one has to be known as the last.
            while len(pending) > batch_images:
                yield Batch(pending[:batch_images], is_last=False)
                pending = pending[batch_images:]
        yield Batch(pending, is_last=True)
