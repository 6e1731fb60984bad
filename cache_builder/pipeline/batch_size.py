"""The batch size of `--batch-size auto`: images in one forward pass. The fixed default is `build_config.BATCH_IMAGES`.

On a GPU it is measured: the batch doubles until it is no faster, does not fit, or fills a shard. On a CPU it is fixed, because
passes of one thread gain nothing from larger batches and take more memory (docs/log.md).
"""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from cache_builder.build_config import BuildConfig
from cache_builder.build_output import OnMessage
from cache_builder.pipeline.device import DeviceWork, MapBatch, device_streams
from cache_builder.pipeline.timing import StageSeconds
from cache_builder.pipeline.views import TeacherView
from cache_builder.teachers.base import Teacher
from radio_cache.errors import ConfigError
from radio_cache.geometry.views import draw_view
from radio_cache.prefetch.ordered import prefetch_map

CPU_BATCH = 4
"""Measured with EfficientNet-Lite0 (docs/log.md): larger batches are slower, and take more memory."""

MAX_BATCH = 1024
_MIN_GAIN = 1.05
"""Gain in images per second below which a batch twice as large is not worth its memory."""

_TIMED_PASSES = 3
"""Timed passes of each stream."""


def resolve_batch_size(config: BuildConfig, teacher: Teacher, on_message: OnMessage) -> BuildConfig:
    """Return the configuration with a batch size measured for the teacher on its device, if it is to be measured."""
    if config.batch_size != "auto":
        return config
    device = torch.device(config.device)
    if device.type == "cpu":
        return replace(config, batch_size=CPU_BATCH)
    max_images = min(MAX_BATCH, config.shard_images * teacher.spec.views)
    batch = fastest_batch(lambda images: images_per_s(teacher, device, images), max_images)
    on_message(f"{teacher.spec.name}: batches of {batch} images")
    return replace(config, batch_size=batch)


def resolve_shared_batch_size(config: BuildConfig, *, begun: bool = False) -> BuildConfig:
    """Return the configuration with one batch size for several workers, which must cut the same batches.

    Args:
        config: the configuration of the build.
        begun: every teacher is in the cache with a batch size of its own.

    Raises:
        ConfigError: the batch size would be measured, on GPUs.
    """
    if config.batch_size != "auto":
        return config
    if begun:
        return replace(config, batch_size=None)
    if not config.device.startswith("cpu"):
        raise ConfigError(
            "--batch-size auto is for one process: workers would each find another size, and batches change last bits on a GPU. "
            "Build a few images without workers, see what it says, and give that number"
        )
    return replace(config, batch_size=CPU_BATCH)


def fastest_batch(rate_of: Callable[[int], float | None], max_images: int) -> int:
    """Return the smallest power of two, or `max_images`, after which doubling brings less than 5 %.

    Args:
        rate_of: batch size -> images per second; None if the batch does not fit into memory.
        max_images: the largest batch to try.
    """
    best, best_rate = 1, 0.0
    for images in _sizes(max_images):
        rate = rate_of(images)
        if rate is None or rate < _MIN_GAIN * best_rate:
            break
        best, best_rate = images, rate
    return best


def _sizes(max_images: int) -> Iterable[int]:
    images = 1
    while images < max_images:
        yield images
        images *= 2
    yield max_images


def images_per_s(teacher: Teacher, device: torch.device, images: int) -> float | None:
    """Return images per second of forward passes as a build makes them, in batches of `images`; None if they do not fit."""
    spec = teacher.spec
    h, w = spec.geometry.input_hw
    pixels = np.random.default_rng(0).integers(0, 256, (h, w, 3), np.uint8)
    batch = [TeacherView(0, draw_view(None, 0, 0, (h, w)), pixels)] * images
    work = DeviceWork(teacher, device, StageSeconds())
    with device_streams(device) as num_streams, ThreadPoolExecutor(num_streams) as streams:

        def passes(count: int) -> list[list[MapBatch]]:
            map_batches = list(prefetch_map(streams, work.features, [batch] * count, depth=num_streams + 1))
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # kernels run on after the calls return
            return map_batches

        # The first passes load kernels and allocate memory. A batch that came back in parts did not fit.
        if any(len(parts) > 1 for parts in passes(num_streams)):
            return None
        count = _TIMED_PASSES * num_streams
        started_s = time.perf_counter()
        for _ in range(count // num_streams):
            if any(len(parts) > 1 for parts in passes(num_streams)):
                return None
        return count * images / (time.perf_counter() - started_s)
