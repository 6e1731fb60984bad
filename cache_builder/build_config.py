"""What a build is asked to do."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from cache_builder.sources import ListingRequest, Selection
from cache_builder.teachers import TeacherOptions, cache_group
from radio_cache.errors import ConfigError
from radio_cache.format.pixels import PixelStore
from radio_cache.format.schema import level_name
from radio_cache.images.decode import MAX_PIXELS

SHARD_IMAGES = 128
"""Images in a shard, unless somebody asks for another number."""

BATCH_IMAGES = 32
"""Images in one forward pass, unless somebody asks for another number."""


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What to build. images: folders, tars, patterns. teachers: what is asked for (a teacher, or NAME@PX for a level) -> how.

    shard_images: images in a shard, the unit of work and of retry. batch_images: images in one forward pass; None takes what a
    teacher was begun with, or BATCH_IMAGES; auto_batch: have that found for each new teacher on its device instead
    (`cache_builder.pipeline.batch_size`).
    filters, shuffle_seed, limit: which images, in what order (`Selection`). member: which member of a sample in a tar is the
    photo. rescan: list the sources even if they look unchanged since the cache was made. max_pixels: larger images are refused.
    threads: for reading and decoding.
    retry_unusable: look again at every image that could not be used, not only at those that could not be read.
    leave_out_unreadable: images that cannot be read are left out, however many.
    pixels: how the cache keeps the images themselves; None takes what a cache that is there does, and a new one keeps none.
    log_json: a file that one JSON object a line is appended to, per shard and per teacher (docs/build.md).
    """

    images: tuple[str, ...]
    teachers: dict[str, TeacherOptions]
    out: str | Path
    shard_images: int = SHARD_IMAGES
    batch_images: int | None = None
    auto_batch: bool = False
    device: str = "cpu"
    filters: tuple[str, ...] = ()
    shuffle_seed: int | None = None
    limit: int | None = None
    member: str = ""
    rescan: bool = False
    retry_unusable: bool = False
    leave_out_unreadable: bool = False
    max_pixels: int = MAX_PIXELS
    pixels: PixelStore | None = None
    log_json: Path | None = None
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)

    def __post_init__(self) -> None:
        for name in ("shard_images", "batch_images", "max_pixels", "threads"):
            if (getattr(self, name) or 0) < 1 and getattr(self, name) is not None:
                raise ConfigError(f"{name.replace('_', ' ')} must be at least 1, not {getattr(self, name)}")
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
    def batch(self) -> int:
        """Images in one forward pass."""
        return BATCH_IMAGES if self.batch_images is None else self.batch_images

    @property
    def groups(self) -> dict[str, tuple[str, TeacherOptions]]:
        """Group in the cache -> the teacher to load for it, and how. Raises UnknownTeacherError."""
        return {
            cache_group(name, options): (options.level_of or name, options) for name, options in self.teachers.items()
        }

    def request(self) -> ListingRequest:
        """All that decides which images there are. Raises ConfigError for what no image could pass."""
        selection = Selection(filters=self.filters, shuffle_seed=self.shuffle_seed, limit=self.limit)
        return ListingRequest(sources=self.images, selection=selection, member=self.member)
