"""Configuration of a build."""

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from cache_builder.sources import ListingRequest, Selection
from cache_builder.teachers import TeacherOptions, cache_group
from radio_cache.errors import ConfigError
from radio_cache.format.pixels import PixelStore
from radio_cache.format.schema import level_name
from radio_cache.images.decode import MAX_PIXELS

BATCH_IMAGES = 32
"""Images in one forward pass, if neither the configuration nor the cache has another number."""


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What to build, and where.

    The fields have the names of the options of `radio-cache build`, in the plural where an option may be repeated, and their
    defaults are the options' defaults.

    Raises:
        ConfigError: a value is not possible.
    """

    images: tuple[str, ...]
    """Folders, tars, Parquet files, lists or patterns."""

    teachers: dict[str, TeacherOptions]
    """Teacher, or NAME@PX for a level -> how it is loaded and stored."""

    out: str | Path
    """Path or URL of the cache."""

    shard_images: int = 128
    """Images in a shard, the unit of work and of retry."""

    batch_size: int | Literal["auto"] | None = None
    """Images in one forward pass. None for the number that a teacher was begun with, or BATCH_IMAGES. "auto" to measure it
    for each new teacher on its device (`cache_builder.pipeline.batch_size`)."""

    device: str = "cpu"
    """Device of the teachers, as torch names it."""

    filters: tuple[str, ...] = ()
    """Patterns of keys, those after a ! left out (`Selection`)."""

    shuffle_seed: int | None = None
    """Seed of a random order of the images; None for the order of the sources."""

    limit: int | None = None
    """Number of images, after the filters and the order."""

    member: str = ""
    """Endings of the member that is the photo of a sample in a tar, such as "jpg;png"; empty if every image is one."""

    rescan: bool = False
    """List the sources even if they look unchanged since the cache was made."""

    retry_unusable: bool = False
    """Scan every unusable image again, not only those that could not be read."""

    leave_out_unreadable: bool = False
    """Leave out images that cannot be read, however many."""

    max_pixels: int = MAX_PIXELS
    """Larger images are refused before they are decoded."""

    pixels: PixelStore | None = None
    """How the cache stores the images themselves. None for the way of an existing cache; a new one stores none."""

    log_json: Path | None = None
    """File to append one JSON object per shard and per teacher to (docs/build.md)."""

    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Threads that read and decode."""

    def __post_init__(self) -> None:
        for name in ("shard_images", "batch_size", "max_pixels", "threads"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"{name.replace('_', ' ')} must be at least 1, not {value}")
        if not self.images:
            raise ConfigError("no --images: name a folder of images, or WebDataset tars")
        if not self.teachers:
            raise ConfigError("no --teacher: name at least one; `radio-cache teachers` lists them")
        for name, options in self.teachers.items():
            size = (options.size_px or 0, options.size_px or 0)
            if options.level_of is not None and name != level_name(options.level_of, size):
                raise ConfigError(f"'{name}' does not name a level of {options.level_of} at {options.size_px} px")
        self.request()

    @property
    def batch_images(self) -> int:
        """Images in one forward pass, with the default for a number that is not known yet."""
        return self.batch_size if isinstance(self.batch_size, int) else BATCH_IMAGES

    @property
    def groups(self) -> dict[str, tuple[str, TeacherOptions]]:
        """Group in the cache -> the teacher to load for it, and how. Raises UnknownTeacherError."""
        return {
            cache_group(name, options): (options.level_of or name, options) for name, options in self.teachers.items()
        }

    def request(self) -> ListingRequest:
        """Return everything that decides which images there are. Raise ConfigError if no image could match."""
        selection = Selection(filters=self.filters, shuffle_seed=self.shuffle_seed, limit=self.limit)
        return ListingRequest(sources=self.images, selection=selection, member=self.member)


BUILD_DEFAULTS: dict[str, Any] = {setting.name: setting.default for setting in fields(BuildConfig)}
"""Field of BuildConfig -> its default, for the options of commands."""
