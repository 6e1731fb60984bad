"""Batch size and device of a teacher's first shards, which decide the last bits of the others.

They are recorded in the spec's `software` when the teacher is registered, but not compared with it. Every later build of the
teacher takes the batch size. Caches of earlier versions have neither.
"""

import platform
from collections.abc import Iterator
from dataclasses import replace

import torch

from cache_builder.build_config import BuildConfig
from radio_cache.errors import StaleCacheError
from radio_cache.format.schema import TeacherSpec
from radio_cache.reader import Cache
from radio_cache.receipts import unfinished_shards

BATCH = "batch_images"
DEVICE = "device"
"""Keys in a spec's `software`. They are stored, so their spelling stays."""

_MAX_BATCH = 1 << 20


def recorded(spec: TeacherSpec, config: BuildConfig) -> TeacherSpec:
    """Return the spec to register, with the batch size and the device of its first shards."""
    return replace(spec, software=spec.software | {BATCH: str(config.batch_images), DEVICE: device_name(config.device)})


def recorded_batch(cache: Cache, name: str) -> int | None:
    """Return the batch size that a teacher's first shards were computed with, or None if it is not recorded."""
    text = cache.teachers[name].spec.software.get(BATCH, "") if name in cache.teachers else ""
    # Written by any program, so it is checked before it decides the size of an allocation.
    return int(text) if text.isdecimal() and len(text) < 8 and 0 < int(text) <= _MAX_BATCH else None


def with_recorded_batch(config: BuildConfig, cache: Cache, name: str) -> BuildConfig:
    """Return the configuration with the batch size that the teacher was begun with, if it is recorded."""
    batch = recorded_batch(cache, name)
    return config if batch is None else replace(config, batch_size=batch)


def device_name(device: str) -> str:
    """Return the name of a device, such as "NVIDIA H200" or "x86_64 with AVX512"."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    if torch.device(device).type == "cpu":
        return f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    return device


def refuse_other_batch(cache: Cache, config: BuildConfig, num_images: int) -> None:
    """Raise StaleCacheError if a number was given as batch size, and an incomplete teacher was begun with another.

    Args:
        cache: the cache.
        config: the configuration.
        num_images: images that the cache will have, which may be about to grow.
    """
    for name in config.groups:
        batch = recorded_batch(cache, name)
        # A complete teacher computes nothing more, so its batch size is of no account.
        if batch is None or config.batch_size in (None, "auto", batch) or _is_complete(cache, name, num_images):
            continue
        raise StaleCacheError(
            f"{cache.url}, teacher '{name}' was begun in batches of {batch} images, this run asks for --batch-size "
            f"{config.batch_size}: another size changes the last bits, and its shards would not be of one kind. Leave "
            f"--batch-size out, ask for {batch}, or build into another --out"
        )


def notes_on_rest(
    cache: Cache, spec: TeacherSpec, config: BuildConfig, num_images: int, *, elsewhere: bool
) -> Iterator[str]:
    """Yield notes about a teacher that was begun earlier, or otherwise, and is about to be continued.

    Args:
        cache: the cache.
        spec: the teacher's spec as this build would register it.
        config: the configuration.
        num_images: images that the cache will have, which may be about to grow.
        elsewhere: other processes compute, whose device is not known in this one.
    """
    if spec.name not in cache.teachers or _is_complete(cache, spec.name, num_images):
        return
    batch = recorded_batch(cache, spec.name)
    if batch is not None and (
        config.batch_size == "auto" or (config.batch_size is None and batch != config.batch_images)
    ):
        yield f"batches of {batch} images, as it was begun with"
    recorded_software = cache.teachers[spec.name].spec.software
    software = spec.software | ({} if elsewhere else {DEVICE: device_name(config.device)})
    changes = [
        f"{key} {recorded_software[key]} then, {software[key]} now"
        for key in sorted(recorded_software.keys() & software.keys())
        if recorded_software[key] != software[key]
    ]
    if changes:
        yield f"its first shards were computed otherwise ({'; '.join(changes)}): the rest may differ from them in the last bits"


def _is_complete(cache: Cache, name: str, num_images: int) -> bool:
    meta = cache.meta
    unfinished = unfinished_shards(cache.receipt_columns(name), meta.shard_rows, meta.num_shards)
    return not unfinished and num_images <= cache.num_images


__all__ = [
    "BATCH",
    "DEVICE",
    "device_name",
    "notes_on_rest",
    "recorded",
    "recorded_batch",
    "refuse_other_batch",
    "with_recorded_batch",
]
