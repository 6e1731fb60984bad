"""Comparison of a cache with its teachers, which run again on a sample of the images.

Checksums show that the stored bytes are those that were written. This check shows that they are right: of that image, by that
teacher, with that preprocessing.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cache_builder.pipeline.calibrate import sample_rows
from cache_builder.pipeline.device import DeviceWork
from cache_builder.pipeline.timing import StageSeconds
from cache_builder.pipeline.views import prefetch_views
from cache_builder.teachers import load_recorded
from cache_builder.teachers.base import Teacher
from radio_cache.errors import (
    ConfigError,
    ImageError,
    MissingRowsError,
    SourceError,
    StaleCacheError,
    StoreError,
    unknown_name,
)
from radio_cache.reader import Cache, CachedTeacher
from radio_cache.statistics.fidelity import PERFECT, token_errors
from radio_cache.terminal.output import ProgressLine

SLACK, SLACK_SHARE = 0.001, 0.5
"""Allowed drop of the mean cosine below the recorded one: a constant plus a share of the codec's loss (1 - cosine).

A sample varies, and other hardware rounds in other ways.
"""

IMAGE_SLACK, IMAGE_SLACK_TIMES = 0.01, 3.0
"""Allowed loss of one image: a constant plus a multiple of the loss that is recorded for the worst percentile of tokens."""

SUMMARY_FLOOR = 0.99
"""Lowest allowed cosine of a summary, which is stored in half precision."""


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """The configuration of the check.

    Attributes:
        count: number of images, sampled by the seed.
        teachers: names of the groups to run; () for all.
        weights: teacher -> file, for weights that moved.
        seed: of the sample.
        device: as in a build.
        batch_images: as in a build.
        threads: as in a build.
    """

    count: int
    teachers: tuple[str, ...]
    weights: Mapping[str, Path] = field(default_factory=dict[str, Path])
    seed: int = 0
    device: str = "cpu"
    batch_images: int = 16
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"--recompute {self.count}: at least 1 image is needed")


@dataclass(frozen=True)
class ImageCosine:
    """The mean cosine between the stored and the recomputed tokens of one image."""

    key: str
    cosine: float


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """The result for one teacher.

    Attributes:
        name: of the teacher's group.
        images: number of images compared.
        recorded: mean cosine recorded in the cache.
        floor: lowest allowed `cosine`.
        image_floor: lowest allowed mean cosine of an image.
        cosine: mean over all tokens of the sample.
        by_image: mean cosine of each image.
        summary: lowest cosine of a summary; None for a teacher without summaries.
    """

    name: str
    images: int
    recorded: float
    floor: float
    image_floor: float
    cosine: float
    by_image: tuple[ImageCosine, ...]
    summary: float | None

    @property
    def worst(self) -> ImageCosine:
        """The image with the lowest mean cosine."""
        return min(self.by_image, key=lambda image: image.cosine)

    def complaints(self) -> list[str]:
        """Return one sentence for each difference that exceeds its bound."""
        sentences: list[str] = []
        # `not >=` instead of `<`, so that NaN is a complaint too.
        if not self.cosine >= self.floor:
            sentences.append(
                f"{self.name}: a mean cosine of {self.cosine:.4f} is below {self.floor:.4f}: these are not this teacher's "
                "features of these images, or the fidelity is lower than recorded. Run radio-cache drop-teacher, then build again"
            )
        low_images = sorted(
            (image for image in self.by_image if not image.cosine >= self.image_floor), key=lambda image: image.cosine
        )
        sentences += [
            f"{self.name}: {image.key} has {image.cosine:.4f}: its stored features differ from those that the teacher computes"
            for image in low_images[:5]  # a wrong teacher would list every image
        ]
        if len(low_images) > 5:
            sentences.append(f"{self.name}: ... and {len(low_images) - 5} more images")
        if self.summary is not None and not self.summary >= SUMMARY_FLOOR:
            sentences.append(f"{self.name}: a summary has a cosine of {self.summary:.4f}, below {SUMMARY_FLOOR}")
        return sentences


@dataclass(frozen=True)
class RecomputeReport:
    """The result of the check.

    Attributes:
        teachers: in the requested order.
        unreadable: key -> reason why an image of the sample could not be compared.
    """

    teachers: tuple[Recomputed, ...]
    unreadable: dict[str, str]

    @property
    def ok(self) -> bool:
        """True if no teacher has a complaint."""
        return not any(teacher.complaints() for teacher in self.teachers)


def recompute(cache: Cache, config: RecomputeConfig) -> RecomputeReport:
    """Run teachers again on a sample of the images that all of them have.

    Args:
        cache: whose images are still where they were when it was built.
        config: of the check.

    Raises:
        StoreError: for a teacher that is not in the cache.
        MissingRowsError: if no image has features of all teachers.
        TeacherError: for weights that are missing or differ from those of the build.
        StaleCacheError: if this version runs a teacher in another way than the build did.
        SourceError: if no image of the sample is unchanged.
    """
    for name in config.teachers:
        if name not in cache.teachers:
            raise StoreError(f"{cache.url}: " + unknown_name("cached teacher", name, cache.teachers))
    cache.refuse_large_images()
    usable = cache.usable_rows(config.teachers)
    if not config.teachers or not len(usable):
        raise MissingRowsError(f"{cache.url}: nothing to recompute: no image has its features yet")
    # Loaded before the first one runs, so that missing weights are reported at once and not after hours.
    teachers = [_load(cache.teachers[name], config) for name in config.teachers]
    rows, unreadable = _readable(cache, sorted(sample_rows(usable, config.count, f"recompute {config.seed}")))
    if not rows:
        key, reason = next(iter(unreadable.items()))
        raise SourceError(
            f"{cache.url}: none of the {len(unreadable)} images of the sample can be compared, the first is {key}: {reason}. "
            "The images must be where they were when the cache was built"
        )
    recomputed: list[Recomputed] = []
    with ThreadPoolExecutor(config.threads, thread_name_prefix="decode") as pool:
        # Popped, so that each teacher is freed before the next one moves to the device.
        while teachers:
            recomputed.append(_run(cache, teachers.pop(0), rows, config, pool))
    return RecomputeReport(tuple(recomputed), unreadable)


def _load(cached: CachedTeacher, config: RecomputeConfig) -> Teacher:
    teacher = load_recorded(cached.spec, config.weights.get(cached.name))
    # A library may load the same weights in another way since the build.
    differences = cached.spec.differences(teacher.spec)
    if differences:
        raise StaleCacheError(
            f"teacher '{cached.name}': {'; '.join(differences)}: this version of radio-cache cannot recompute its features"
        )
    return teacher


def _readable(cache: Cache, rows: list[int]) -> tuple[list[int], dict[str, str]]:
    """Return the rows whose files have the recorded digest, and key -> reason for the others."""
    readable: list[int] = []
    unreadable: dict[str, str] = {}
    for row in rows:
        try:
            cache.read_file(row)
        except ImageError as exc:
            unreadable[cache.index.key(row)] = str(exc)
        else:
            readable.append(row)
    return readable, unreadable


def _run(
    cache: Cache, teacher: Teacher, rows: list[int], config: RecomputeConfig, pool: ThreadPoolExecutor
) -> Recomputed:
    spec, device, stages = teacher.spec, torch.device(config.device), StageSeconds()
    name, cached = spec.name, cache.teachers[spec.name]
    teacher.to(device)
    work = DeviceWork(teacher, device, stages)
    # One view per image, in turn, so that the sample covers all views at the price of one.
    views = {row: number % spec.views for number, row in enumerate(rows)}
    by_image: list[ImageCosine] = []
    cosines: list[NDArray[np.float64]] = []
    summaries: list[NDArray[np.float64]] = []
    jobs = [(row, (view,)) for row, view in views.items()]
    image_views = prefetch_views(cache, spec, jobs, pool, stages, depth=2 * config.batch_images)
    with ProgressLine(f"{name}, recomputing", len(rows)) as line:
        while batch := list(islice(image_views, config.batch_images)):
            for part in work.features(batch):
                # live_maps (b, h, w, c), summary (b, d)
                live_maps, summary = (
                    part.spatial.cpu().numpy(),
                    None if part.summary is None else part.summary.cpu().numpy(),
                )
                for number, image_view in enumerate(part.views):
                    view, on_image = views[image_view.row], image_view.valid_tokens(spec.geometry)
                    cached_map = cached.maps([image_view.row], view=view)[0]
                    # (h, w, c) -> (tokens on the image, c) -> (tokens,)
                    image_cosines, _ = token_errors(live_maps[number][on_image], cached_map[on_image])
                    # An image so thin that no token's centre lies on it has no token to differ in.
                    mean_cosine = float(image_cosines.mean()) if len(image_cosines) else 1.0
                    by_image.append(ImageCosine(cache.index.key(image_view.row), mean_cosine))
                    cosines.append(image_cosines)
                    if summary is not None:
                        # (1, d) against (1, d) -> (1,)
                        stored = cached.summaries([image_view.row], view=view)
                        summaries.append(token_errors(summary[number : number + 1], stored)[0])
                line.advance(len(part.views))
    # The first caches recorded no fidelity. They store half precision, which loses next to nothing.
    recorded = cached.fidelity() or PERFECT
    tokens = np.concatenate(cosines)
    return Recomputed(
        name=name,
        images=len(rows),
        recorded=recorded.cosine,
        floor=recorded.cosine - SLACK - SLACK_SHARE * (1 - recorded.cosine),
        image_floor=1 - IMAGE_SLACK - IMAGE_SLACK_TIMES * (1 - recorded.cosine_worst),
        cosine=float(tokens.mean()) if len(tokens) else PERFECT.cosine,
        by_image=tuple(by_image),
        summary=float(np.concatenate(summaries).min()) if summaries else None,
    )


__all__ = ["ImageCosine", "RecomputeConfig", "RecomputeReport", "Recomputed", "recompute"]
