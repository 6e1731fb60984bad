"""Predicted cost of a build: time, money and bytes, from a short measured probe. Writes nothing.

Per teacher and image: on a CPU, decoding, the teacher and encoding share the cores, so their times add up.
With a GPU they overlap, and the slower of decoding and (teacher + encoding) counts. Every image is also scanned
once, and calibration runs on its sample once more.

Caching against live teachers: a cache costs its build once. Without it every student run costs
steps x batch x (the teachers' seconds per image) in addition to its own time. So the cache is cheaper from run

    build device-seconds / (steps x batch x teacher seconds)

on, rounded up. The student's own time is the same in both cases.
"""

import math
import os
import shutil
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cache_builder.build_config import BuildConfig
from cache_builder.build_output import OnMessage, check_same, missing_shards, open_cache, with_recorded_loading
from cache_builder.computed_with import with_recorded_batch
from cache_builder.pipeline.batch_size import resolve_batch_size
from cache_builder.pipeline.calibrate import min_calibration_images, sample_size
from cache_builder.planning.measure import CodecCost, TeacherProbe, probe_cache, probe_teacher, time_scan
from cache_builder.sources import list_for
from cache_builder.teachers import TeacherOptions, find_teacher, find_weights, load_teacher_file
from cache_builder.teachers.base import Teacher
from cache_builder.teachers.random_weights import random_weights
from radio_cache.codecs.calibrate import CodecRequest
from radio_cache.errors import ConfigError, TeacherWeightsError
from radio_cache.format.schema import IMAGES_UNIT, TeacherSpec
from radio_cache.images.index import index_columns
from radio_cache.reader import Cache, is_cache
from radio_cache.storage.base import is_url
from radio_cache.usual_run import UsualRun, usual_run

SCAN_BYTES = 1 + 8 + 16
"""Bytes of one image in the columns status, size and digest."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """The configuration of a plan.

    Attributes:
        build: the build that is planned.
        dollars_per_hour: price of one device; None without a price.
        devices: workers like this machine's device, each with as many cores.
        student_steps: of one student run; None for the default of `radio-train`.
        student_batch: of one student run; None for the default of `radio-train`.
        probe_images: number of images for each teacher's measurement.
        probe_s: time limit of each teacher's measurement.
        no_weights: use random weights if a teacher's file is missing. Times do not depend on them.
    """

    build: BuildConfig
    devices: int = 1
    dollars_per_hour: float | None = None
    student_steps: int | None = None
    student_batch: int | None = None
    probe_images: int = 64
    probe_s: float = 20.0
    no_weights: bool = False

    def __post_init__(self) -> None:
        for name in ("devices", "student_steps", "student_batch", "probe_images"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name.replace('_', ' ')} must be at least 1, not {getattr(self, name)}")
        if self.probe_s <= 0:
            raise ConfigError(f"probe seconds must be more than 0, not {self.probe_s:g}")
        if self.dollars_per_hour is not None and not 0 <= self.dollars_per_hour < math.inf:
            raise ConfigError(f"dollars per hour must be 0 or more, not {self.dollars_per_hour:g}")


@dataclass(frozen=True, kw_only=True)
class TeacherPlan:
    """One teacher of a plan.

    Attributes:
        images_left: images without features in the cache.
        seconds: of one device, calibration included.
        calibration_s: part of `seconds` that is spent once, on one device.
        random_weights: whether it was measured with random weights.
        views: of each image, including the whole one.
    """

    probe: TeacherProbe
    views: int
    images_left: int
    seconds: float
    calibration_s: float
    random_weights: bool

    @property
    def stored(self) -> CodecCost:
        """Cost in the requested codec, or in half, as an upper bound, if that could not be measured."""
        # Half needs no calibration, so that it always has a cost.
        requested_cost = self.probe.cost_of(self.probe.requested)
        return (
            requested_cost
            if requested_cost.bytes_per_image is not None
            else self.probe.cost_of(CodecRequest(name="half"))
        )

    @property
    def is_upper_bound(self) -> bool:
        """True if `stored` is the cost of half, because the requested codec could not be measured."""
        return self.stored.request != self.probe.requested

    @property
    def bytes_per_image(self) -> float:
        """Bytes of the maps and summaries of all views of one image."""
        assert self.stored.bytes_per_image is not None, "half is always measured"
        return self.views * (self.stored.bytes_per_image + self.probe.summary_bytes)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The predicted cost of a build.

    Attributes:
        scan_s: time to scan the unscanned images, on one device's cores.
        num_unscanned: number of unscanned images.
        pixel_bytes: bytes of a stored image; 0 without --store-pixels.
        free_bytes: free space of the cache's disk; None in a bucket.
    """

    config: PlanConfig
    num_images: int
    num_shards: int
    index_bytes: float
    free_bytes: int | None
    scan_s: float
    num_unscanned: int
    pixel_bytes: float
    teachers: tuple[TeacherPlan, ...]
    notes: tuple[str, ...]

    @property
    def stored_bytes(self) -> float:
        """Bytes of the complete cache."""
        of_image = self.pixel_bytes + sum(teacher.bytes_per_image for teacher in self.teachers)
        return self.index_bytes + self.num_images * of_image

    @property
    def bytes_to_write(self) -> float:
        """Bytes that the planned build writes: less than `stored_bytes` if the cache exists in part."""
        features = sum(teacher.images_left * teacher.bytes_per_image for teacher in self.teachers)
        return features + self.num_unscanned * self.pixel_bytes + self.index_bytes

    @property
    def fits(self) -> bool | None:
        """True if the disk has room for the build; None if the free space is not known."""
        return None if self.free_bytes is None else self.bytes_to_write <= self.free_bytes

    @property
    def device_s(self) -> float:
        """Device-seconds of the whole build."""
        return self.scan_s + sum(teacher.seconds for teacher in self.teachers)

    def wall_s(self, devices: int) -> float:
        """Return the seconds that the build takes on this number of devices."""
        # Calibration runs on one device while the others wait, and more devices than shards have nothing to do.
        once = sum(teacher.calibration_s for teacher in self.teachers)
        return once + (self.device_s - once) / min(devices, self.num_shards)

    @property
    def dollars(self) -> float | None:
        """Price of all devices during the build."""
        rate = self.config.dollars_per_hour
        return None if rate is None else self.wall_s(self.config.devices) * self.config.devices / 3600 * rate

    @property
    def student_run(self) -> UsualRun:
        """Steps and batch of one student run."""
        config = self.config
        return usual_run(
            self.num_images, config.build.device, steps=config.student_steps, batch_images=config.student_batch
        )

    @property
    def online_s(self) -> float:
        """Device-seconds of the teachers in one student run without a cache."""
        return self.student_run.crops * sum(teacher.probe.forward_s for teacher in self.teachers)

    @property
    def runs_to_break_even(self) -> float:
        """Number of student runs after which the cache has paid for itself; below 1, the first run is cheaper already.

        That many runs with live teachers cost as many device-seconds as the build.
        """
        return self.device_s / self.online_s

    def to_json(self) -> dict[str, Any]:
        """Return all measured and derived values, in seconds and bytes."""
        return {
            "images": self.num_images,
            "shards": self.num_shards,
            "device": self.config.build.device,
            "threads": self.config.build.threads,
            "devices": self.config.devices,
            "scan_seconds": self.scan_s,
            "pixel_bytes_per_image": self.pixel_bytes,
            # The key of the first version, which scripts read.
            "images_unseen": self.num_unscanned,
            "teachers": [_teacher_json(teacher) for teacher in self.teachers],
            "index_bytes": self.index_bytes,
            "stored_bytes": self.stored_bytes,
            "bytes_to_write": self.bytes_to_write,
            "free_bytes": self.free_bytes,
            "fits": self.fits,
            "seconds_on_one_device": self.wall_s(1),
            "seconds": self.wall_s(self.config.devices),
            "device_seconds": self.device_s,
            "dollars": self.dollars,
            "student_steps": self.student_run.steps,
            "student_batch": self.student_run.batch_images,
            "online_seconds_per_run": self.online_s,
            "runs_to_break_even": self.runs_to_break_even,
            "notes": list(self.notes),
        }


def _teacher_json(teacher: TeacherPlan) -> dict[str, Any]:
    return {
        **asdict(teacher.probe),
        "images_left": teacher.images_left,
        "seconds": teacher.seconds,
        "calibration_seconds": teacher.calibration_s,
        "views": teacher.views,
        "random_weights": teacher.random_weights,
        "bytes_per_image": teacher.bytes_per_image,
        "is_upper_bound": teacher.is_upper_bound,
    }


def plan_build(config: PlanConfig, on_message: OnMessage = lambda _: None) -> Plan:
    """List the images, run a few of them through every teacher, and predict the cost of the build.

    Args:
        config: of the plan.
        on_message: called with one sentence at a time about the progress.

    Raises:
        RadioCacheError: any of the errors that `build_cache` raises before it writes anything.
    """
    build = config.build
    existing = Cache(build.out) if is_cache(build.out) else None
    # An existing cache fixes what the build may not change, as in `build_cache`.
    if existing is not None and build.pixels is None:
        build = replace(build, pixels=existing.meta.pixels)
    build = with_recorded_loading(build, existing)
    listing = list_for(build.request(), existing, rescan=build.rescan)
    cache = open_cache(build, listing) if existing is not None else None
    num_images = len(listing.index)
    notes = list(listing.notes)
    plans: list[TeacherPlan] = []
    with (
        ThreadPoolExecutor(build.threads, thread_name_prefix="decode") as pool,
        probe_cache(listing, min(config.probe_images, num_images), build) as sample,
    ):
        sample, scan_s, pixel_bytes = time_scan(sample, pool)
        for name, options in build.teachers.items():
            on_message(f"{name}: measuring on {len(sample.usable_rows())} of {num_images} images")
            with _load_for_plan(options.level_of or name, options, no_weights=config.no_weights) as (
                teacher,
                is_random,
            ):
                teacher.to(torch.device(build.device))
                group = teacher.spec.name
                notes += [f"{name}: {note}" for note in teacher.notes]
                # Random weights have another checksum than the cached ones, so that a comparison would fail.
                if is_random:
                    notes.append(
                        f"{name}: measured with random weights (--no-weights): times hold, bytes of klt do not"
                    )
                elif cache is not None:
                    check_same(cache, [teacher.spec])
                # A teacher that is built in part goes on with its recorded batch size.
                teacher_build = build if cache is None else with_recorded_batch(build, cache, group)
                probe = probe_teacher(
                    sample,
                    teacher,
                    _request(options, teacher.spec, num_images, cache),
                    resolve_batch_size(teacher_build, teacher, on_message),
                    pool,
                    seconds=config.probe_s,
                    has_trained_weights=not is_random,
                )
                sample_images = min(num_images, sample_size(teacher.spec))
            images_left = _images_left(cache, group, num_images)
            plans.append(teacher_plan(probe, images_left, sample_images, cache, build, is_random, views=options.views))
    # An image is scanned once, whichever teachers follow.
    num_unscanned = _images_left(cache, IMAGES_UNIT, num_images)
    columns = index_columns(listing.index).values()
    return Plan(
        config=config,
        num_images=num_images,
        num_shards=-(-num_images // build.shard_images),
        index_bytes=sum(column.nbytes for column in columns) + SCAN_BYTES * num_images,
        free_bytes=free_bytes(build.out),
        scan_s=scan_s * num_unscanned,
        num_unscanned=num_unscanned,
        pixel_bytes=pixel_bytes,
        teachers=tuple(plans),
        notes=tuple(notes),
    )


def _request(options: TeacherOptions, spec: TeacherSpec, num_images: int, cache: Cache | None) -> CodecRequest:
    """Return the codec that the build will use: that of the cache, the requested one, or its default."""
    # The codec of a teacher is fixed once its group exists, whatever the command requests.
    is_cached = cache is not None and spec.name in cache.teachers
    codec = cache.teachers[spec.name].spec.codec if cache is not None and is_cached else options.codec
    if request := codec.requested():
        return request
    # Without a recorded request, the name alone decides the codec.
    if is_cached:
        return CodecRequest(name=codec.parameters["name"])
    return CodecRequest() if num_images >= min_calibration_images(spec) else CodecRequest(name="half")


def teacher_plan(
    probe: TeacherProbe,
    images_left: int,
    sample_images: int,
    cache: Cache | None,
    build: BuildConfig,
    is_random: bool,
    *,
    views: int = 1,
) -> TeacherPlan:
    """Return the predicted cost of one teacher, from its measurement.

    Args:
        probe: the measurement.
        images_left: images without features in the cache.
        sample_images: images that the codec is calibrated on.
        cache: the existing cache; None for a new one.
        build: the build that is planned.
        is_random: whether the weights were random.
        views: of each image, each counted as an image of its own. Views share one decoding, so this is an upper bound.
    """
    on_device_s = probe.forward_s + probe.encode_s
    on_cores_s = probe.decode_s + probe.pack_s / build.threads
    # On a CPU both use the same cores and add up; a GPU runs beside them, and the slower one sets the pace.
    seconds = views * (on_device_s + on_cores_s if build.device == "cpu" else max(on_device_s, on_cores_s))
    # A teacher that is in the cache already has its codec.
    calibrates = probe.requested.needs_calibration and (cache is None or probe.name not in cache.teachers)
    calibration_s = sample_images * (probe.forward_s + probe.decode_s) if calibrates else 0.0
    return TeacherPlan(
        probe=probe,
        views=views,
        images_left=images_left,
        seconds=images_left * seconds + calibration_s,
        calibration_s=calibration_s,
        random_weights=is_random,
    )


def _images_left(cache: Cache | None, unit: str, num_images: int) -> int:
    if cache is None or (unit != IMAGES_UNIT and unit not in cache.teachers):
        return num_images
    missing = sum(len(cache.meta.shard_rows(shard)) for shard in missing_shards(cache, unit))
    # The source may have grown since the cache was built.
    return missing + num_images - cache.num_images


@contextmanager
def _load_for_plan(name: str, options: TeacherOptions, *, no_weights: bool) -> Generator[tuple[Teacher, bool]]:
    """Yield a teacher on the CPU and a flag that is True for random weights.

    Raises:
        TeacherWeightsError: if its weights are missing and `no_weights` is False.
    """
    preset = find_teacher(name)
    try:
        path = find_weights(preset, options.weights)
    except TeacherWeightsError as exc:
        if not no_weights:
            raise TeacherWeightsError(
                f"{exc}\nTo plan without this file, add --no-weights: times do not depend on the weights"
            ) from exc
        # The temporary file must exist until the caller is done with the teacher.
        with random_weights(preset) as path:
            yield load_teacher_file(name, path, options), True
        return
    yield load_teacher_file(name, path, options), False


def free_bytes(path_or_url: str | Path) -> int | None:
    """Return the free bytes of the disk on which a cache is to be written; None for a bucket.

    Args:
        path_or_url: of the cache, which need not exist yet.
    """
    if is_url(path_or_url):
        return None
    path = Path(path_or_url).absolute()
    # `Path.exists` raises without permission to look, `os.path.exists` does not.
    existing = next(folder for folder in (path, *path.parents) if os.path.exists(folder))  # noqa: PTH110
    return shutil.disk_usage(existing).free


__all__ = ["Plan", "PlanConfig", "TeacherPlan", "free_bytes", "plan_build", "teacher_plan"]
