"""`--batch-size auto`: how many images to show a teacher at once.

On a GPU it is measured: the batch doubles until it is no faster, does not fit any more, or fills a shard. On a CPU it is fixed:
passes of one thread gain nothing from larger batches, and take more memory (docs/log.md).
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
from radio_cache.prefetch.ordered import ahead

CPU_BATCH = 4
"""Measured with EfficientNet-Lite0 (docs/log.md): larger batches are slower, and take more memory."""

MOST_IMAGES = 1024
_FASTER = 1.05
"""Of images a second, to take a batch twice as large."""

_PASSES = 3
"""Timed, of each stream."""


def resolve_batch_size(config: BuildConfig, teacher: Teacher, say: OnMessage) -> BuildConfig:
    """The config with a batch that suits the teacher, which is on its device, if it is to be found; else as it is."""
    if not config.auto_batch:
        return config
    device = torch.device(config.device)
    if device.type == "cpu":
        return replace(config, batch_images=CPU_BATCH, auto_batch=False)
    most = min(MOST_IMAGES, config.shard_images * teacher.spec.views)
    batch = fastest_batch(lambda images: images_per_s(teacher, device, images), most)
    say(f"{teacher.spec.name}: batches of {batch} images")
    return replace(config, batch_images=batch, auto_batch=False)


def resolve_shared_batch_size(config: BuildConfig, *, begun: bool = False) -> BuildConfig:
    """The config for several workers, which must cut the same batches. Raises ConfigError on a GPU, where each would measure.

    begun: every teacher is in the cache with a batch size of its own.
    """
    if not config.auto_batch or begun:
        return replace(config, auto_batch=False)
    if not config.device.startswith("cpu"):
        raise ConfigError(
            "--batch-size auto is for one process: workers would each find another size, and batches change last bits on a GPU. "
            "Build a few images without workers, see what it says, and give that number"
        )
    return replace(config, batch_images=CPU_BATCH, auto_batch=False)


def fastest_batch(rate: Callable[[int], float | None], most: int) -> int:
    """The smallest power of two, or `most`, after which doubling brings less than 5 %.

    rate: images a second in batches of that size; None where they do not fit.
    """
    best, best_rate = 1, 0.0
    for images in _sizes(most):
        here = rate(images)
        if here is None or here < _FASTER * best_rate:
            break
        best, best_rate = images, here
    return best


def _sizes(most: int) -> Iterable[int]:
    images = 1
    while images < most:
        yield images
        images *= 2
    yield most


def images_per_s(teacher: Teacher, device: torch.device, images: int) -> float | None:
    """Of forward passes as a build makes them, in batches of that size; None if they do not fit into memory."""
    spec = teacher.spec
    h, w = spec.geometry.input_hw
    pixels = np.random.default_rng(0).integers(0, 256, (h, w, 3), np.uint8)
    batch = [TeacherView(0, draw_view(None, 0, 0, (h, w)), pixels)] * images
    work = DeviceWork(teacher, device, StageSeconds())
    with device_streams(device) as num_streams, ThreadPoolExecutor(num_streams) as streams:

        def passes(count: int) -> list[list[MapBatch]]:
            done = list(ahead(streams, work.features, [batch] * count, depth=num_streams + 1))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return done

        # The first ones load kernels and allocate.
        if any(len(parts) > 1 for parts in passes(num_streams)):
            return None
        count = _PASSES * num_streams
        started = time.perf_counter()
        for _ in range(count // num_streams):
            if any(len(parts) > 1 for parts in passes(num_streams)):
                return None
        return count * images / (time.perf_counter() - started)
