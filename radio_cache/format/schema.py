"""Format version 1 as code: what the JSON in a cache means and where each file lies (docs/format.md).

A cache is one Zarr v3 group. Numbers live in arrays that any Zarr tool reads; this module holds the rest.
"""

import errno
import json
import math
import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from enum import IntEnum
from typing import Any, Literal, TypeVar, cast

from radio_cache.errors import ConfigError, CorruptShardError, LimitError, StoreError, UnsupportedFormatError
from radio_cache.format.checksums import crc32c
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.paths import checked_path
from radio_cache.format.pixels import MAX_SIDE_PX, PixelStore
from radio_cache.format.strict_json import from_json
from radio_cache.geometry.crops import ViewGeometry
from radio_cache.geometry.views import ViewSampling
from radio_cache.statistics.fidelity import Fidelity

FORMAT_VERSION = 1
ATTRIBUTES_KEY = "radio_cache"
"""Our attributes sit under this key of the group's attributes, so that other tools may keep theirs beside."""

TRANSFORM = "transform"
"""Below a teacher's group: the small arrays its codec decodes with."""

IMAGES_UNIT = "images"
"""The unit of work that looks at every image once; the others are teachers."""

MAX_IMAGES = 1 << 32
MAX_SHARD_IMAGES = 1 << 20
MAX_SHARDS = 1 << 24
MAX_VIEWS = 1 << 10
MAX_WIDTH = 1 << 20
MAX_ROW_VALUES = 1 << 28
MAX_ROW_BYTES = 1 << 30
MAX_IMAGE_PIXELS = 1 << 32
"""What a cache may declare at most: of images, images in a shard, shards, views, channels, pixels along a side of a
teacher's input, values and stored bytes of one image's map, pixels of an image. Checked before anything is allocated,
because a cache may come from an untrusted source."""

CONTAINER_KINDS = ("folder", "tar", "list", "parquet")
"""Kinds of containers of images: files below a folder, members of a tar (read by offset), files that a text file lists, rows of a
Parquet file with an image's bytes."""

T = TypeVar("T")

# \Z instead of $, which also matches before a line feed at the end.
_INDEX_GROUP = re.compile(rf"{IMAGES_UNIT}(/index-[0-9a-z]+)?\Z")
# Lower case only: a file system that ignores case would merge two teachers. A number behind "@" is a level.
_TEACHER_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*(@[0-9]+)?\Z")


class ImageStatus(IntEnum):
    """The result of scanning an image, stored in `images/status`. 0 is the fill value."""

    NOT_SEEN = 0
    OK = 1
    UNUSABLE = 2


def refuse_teacher_name(name: str) -> None:
    """Raise ConfigError for what cannot be the name of a teacher, and of its group in a cache."""
    if not _TEACHER_NAME.match(name) or name == IMAGES_UNIT:
        raise ConfigError(
            f"teacher name {name!r:.60} cannot name a group: use lower case letters, digits, '.', '_', '-'"
        )


@dataclass(frozen=True, kw_only=True)
class Container:
    """A place of image files. Keys of its images start with `prefix`.

    Attributes:
        kind: one of CONTAINER_KINDS. A cache with an unknown one opens, but its pixels cannot be read.
        path: path or URL of the folder, tar, list or Parquet file.
        column: of the images, in a Parquet file. Nested fields are separated by a point ("image.bytes").
    """

    kind: str
    path: str
    prefix: str
    column: str = ""

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        if not self.column:
            del data["column"]  # left out, as in the first caches
        return data


@dataclass(frozen=True, kw_only=True)
class CacheMeta:
    """Attributes of the root group.

    shard_images: images in one shard, which is the unit of work, of commit and of retry, for every array alike.
    class_names: names of the labels 0, 1, ...; empty when the source has numbers only, or no labels.
    index: the group with the list of images; a cache that grows gets a new one.
    pixels: how the images themselves are kept in the cache; None where they are not.
    """

    num_images: int
    shard_images: int
    creator: str
    containers: tuple[Container, ...]
    class_names: tuple[str, ...]
    max_pixels: int
    index: str = IMAGES_UNIT
    pixels: PixelStore | None = None

    def __post_init__(self) -> None:
        check_limit("images", self.num_images, MAX_IMAGES)
        check_limit("images in a shard", self.shard_images, MAX_SHARD_IMAGES)
        check_limit("shards", self.num_shards, MAX_SHARDS)
        check_limit("pixels in an image", self.max_pixels, MAX_IMAGE_PIXELS)
        check_limit("places that images come from", len(self.containers), MAX_IMAGES)
        if not _INDEX_GROUP.match(self.index):
            raise LimitError(f"the cache keeps its list of images in {self.index!r}, which is no place inside a cache")

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.shard_images)

    def shard_rows(self, shard: int) -> range:
        """Rows (image numbers) of a shard; the last shard may be short."""
        first = shard * self.shard_images
        return range(first, min(first + self.shard_images, self.num_images))

    def to_json(self) -> dict[str, Any]:
        # `asdict` does not call `to_json` of the containers.
        data = asdict(self) | {"containers": tuple(container.to_json() for container in self.containers)}
        if self.index == IMAGES_UNIT:
            del data["index"]  # left out, as in the first caches
        if self.pixels is None:
            del data["pixels"]
        return _sealed({"format_version": FORMAT_VERSION, **data})

    @classmethod
    def from_json(cls, data: dict[str, Any], place: str = "zarr.json") -> "CacheMeta":
        """Parse the root's attributes.

        Args:
            data: the attributes.
            place: path or URL of the document, for messages.

        Raises:
            UnsupportedFormatError: for a newer version.
            CorruptShardError: for damaged contents.
            LimitError: for implausible sizes.
        """
        # Before the checksum, which a newer version may compute in another way.
        version = data.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise UnsupportedFormatError(
                f"{place}: the cache has format version {version!r:.40}, this radio-cache reads version {FORMAT_VERSION}: "
                "install the radio-cache that wrote it, or a newer one"
            )
        known = _unsealed(data, f"{place}: the cache's own document")
        del known["format_version"]
        # Before the strict parser, which would report the fields of a newer version as damage.
        _refuse_newer_containers(known.get("containers"), place)
        return _parsed(cls, known, f"{place}: the cache's own document")


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Pixels to teacher input: (value / scale - mean) / std per channel, for values 0 to 255."""

    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET_PIXELS = Normalisation(scale=255.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """Everything that decides a teacher's stored bytes, and everything the trainer needs to know about it.

    Attributes:
        name: the group below `teachers/`; lower case letters, digits, '.', '_' and '-'.
        summary_dim: width of the one vector per image; None for teachers without a summary (SAM).
        spatial_dim: width of the one vector per token.
        summary_note: a description of the summary.
        spatial_note: a description of the tokens.
        weights: source of the weights; not compared.
        weights_sha256: hash of their file.
        compute_dtype: precision of the forward pass.
        codec: its parameters and its calibration.
        software: versions of the libraries that computed the features; not compared.
        views: 1 for the whole image, plus the extra ones of `view_sampling`.
        level_of: the teacher of which this is a further input size, in a group named by `level_name`.
        loaded: choices made when the file was loaded: which of several sets of tensors, how position embeddings were resized.
            Empty without a choice, and in caches from before the field existed: those used the set `state_dict` or `model`, and
            resized as the library does.
    """

    name: str
    family: str
    model: str
    licence: str
    weights: str
    weights_sha256: str
    geometry: ViewGeometry
    normalisation: Normalisation
    summary_dim: int | None
    spatial_dim: int
    summary_note: str
    spatial_note: str
    compute_dtype: str
    codec: CodecRecord
    views: int
    software: dict[str, str]
    level_of: str | None = None
    view_sampling: ViewSampling | None = None
    loaded: dict[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        refuse_teacher_name(self.name)
        # Readers group levels by the name and by `level_of`, so both have to agree.
        level = None if self.level_of is None else level_name(self.level_of, self.geometry.input_hw)
        if level != (self.name if "@" in self.name else None):
            raise ConfigError(
                f"teacher name '{self.name:.60}': a name with '@' is that of a level, such as "
                f"'{level or level_name(self.name.partition('@')[0], self.geometry.input_hw):.60}'"
            )
        what = f"of teacher '{self.name}'"
        check_limit(f"views {what}", self.views, MAX_VIEWS)
        if (self.views > 1) != (self.view_sampling is not None):
            raise ConfigError(
                f"{self.views} views {what}, and {'not' if self.views > 1 else 'also'} how extra ones are drawn"
            )
        check_limit(f"channels {what}", self.spatial_dim, MAX_WIDTH)
        if self.summary_dim is not None:
            check_limit(f"channels in a summary {what}", self.summary_dim, MAX_WIDTH)
        for side in (*self.geometry.input_hw, self.geometry.resize_px):
            check_limit(f"pixels along the input {what}", side, MAX_SIDE_PX)
        check_limit(f"values in a map {what}", math.prod(self.geometry.grid_hw) * self.spatial_dim, MAX_ROW_VALUES)

    def to_json(self) -> dict[str, Any]:
        data = asdict(self) | {"codec": self.codec.to_json()}
        for name in ("level_of", "view_sampling"):
            if data[name] is None:
                del data[name]  # left out, as in the first caches
        if not self.loaded:
            del data["loaded"]  # left out, as in the first caches
        return _sealed(data)

    @classmethod
    def from_json(cls, data: dict[str, Any], place: str = "zarr.json") -> "TeacherSpec":
        """Parse a teacher's attributes.

        Args:
            data: the attributes.
            place: path or URL of the document, for messages.

        Raises:
            CorruptShardError: for damaged contents.
            LimitError: for implausible sizes.
        """
        fields = _unsealed(data, f"{place}: a teacher's spec")
        # `CodecRecord` allows sections that the strict parser would refuse. Other values are left to the parser's error.
        if isinstance(fields.get("codec"), dict):
            fields["codec"] = CodecRecord.from_json(fields["codec"])
        try:
            return _parsed(cls, fields, f"{place}: a teacher's spec")
        except ConfigError as exc:
            raise CorruptShardError(f"{place}: a teacher's spec is impossible: {exc}") from exc

    def differences(self, requested: "TeacherSpec") -> list[str]:
        """Describe the fields in which the stored spec differs from a requested one, except those for information only."""
        # A request without a codec accepts the stored one.
        stored_codec = self.codec.request_json() if requested.codec.is_chosen else {}
        # The source of the weights may differ, as their hash identifies them.
        stored_fields = _flat(asdict(replace(self, software={}, weights="")) | {"codec": stored_codec})
        asked_fields = _flat(
            asdict(replace(requested, software={}, weights="")) | {"codec": requested.codec.request_json()}
        )
        names = sorted(stored_fields.keys() | asked_fields.keys())
        return [
            f"{name} is {stored_fields.get(name)}, this run asks for {asked_fields.get(name)}"
            for name in names
            if stored_fields.get(name) != asked_fields.get(name)
        ]


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flat(cast(dict[str, Any], value), f"{prefix}{key}.")
        else:
            # JSON has lists where a spec has tuples.
            flat[prefix + key] = tuple(value) if isinstance(value, list) else value
    return flat


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One file a unit of work wrote: its path below the unit's group, its size and its `shards.file_crc32c`."""

    path: str
    num_bytes: int
    crc32c: int

    def __post_init__(self) -> None:
        # The path comes from a receipt, which may be hostile, and is opened below the cache.
        checked_path(self.path)


FaultKind = Literal["image", "surroundings"]
"""Cause of an unusable image: its own bytes, or its surroundings, in which case nothing is known of the bytes."""

# The system's own texts, which earlier versions stored in place of a kind.
_UNREADABLE = re.compile(
    r"cannot be read: (there is nothing at |the server refuses |("
    + "|".join(
        re.escape(os.strerror(number))
        for number in (
            errno.ENOENT,
            errno.EACCES,
            errno.EPERM,
            errno.EIO,
            errno.ESTALE,
            errno.EMFILE,
            errno.ENFILE,
            errno.ENOMEM,
            errno.ETIMEDOUT,
            errno.ENOTDIR,
            errno.ENODEV,
            errno.ENXIO,
            errno.ENOTCONN,
            errno.EHOSTDOWN,
            errno.EBUSY,
            errno.EAGAIN,
        )
    )
    + r")\Z)"
)
"""Reasons in caches without kinds that were no fault of the image."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One image that cannot be used, and why.

    Args: kind: "surroundings" if the file could not be read, so that nothing is known of its bytes. Not stored for "image"; the
        first caches have none.
    """

    row: int
    reason: str
    kind: FaultKind = "image"

    @property
    def is_unreadable(self) -> bool:
        """Return whether the image itself may be fine: a build looks at it again."""
        return self.kind == "surroundings" or _UNREADABLE.match(self.reason) is not None

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        if self.kind == "image":
            del data["kind"]  # left out, as in the first caches
        return data


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """Written last, after all the files it names are on disk. No receipt, no shard.

    num_tokens: tokens that show the image, over all usable rows; the statistics in `stats/` are sums over them.
    fidelity: of the stored maps, measured while building; None in units without a codec.
    """

    unit: str
    shard: int
    first_row: int
    num_rows: int
    num_tokens: int
    failures: tuple[Failure, ...]
    files: tuple[StoredFile, ...]
    fidelity: Fidelity | None = None

    def to_json(self) -> dict[str, Any]:
        data = asdict(self) | {"failures": tuple(failure.to_json() for failure in self.failures)}
        if self.fidelity is None:
            del data["fidelity"]
        return _sealed(data)

    def __post_init__(self) -> None:
        # Receipts are read from files, and impossible numbers would reach rows of other shards.
        rows = range(self.first_row, self.first_row + self.num_rows)
        counts = (self.shard, self.first_row, self.num_tokens, *(file.num_bytes for file in self.files))
        if self.num_rows < 1 or min(counts) < 0 or any(failure.row not in rows for failure in self.failures):
            raise StoreError(
                f"a receipt of shard {self.shard} speaks of {self.num_rows} rows from {self.first_row} on, "
                f"{self.num_tokens} tokens, failures of rows {sorted({failure.row for failure in self.failures})[:5]}: impossible"
            )

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Receipt":
        """Parse a receipt.

        Raises:
            StoreError: for a wrong checksum, other fields, or impossible values.
        """
        return _parsed(cls, _unsealed(data, "a receipt"), "a receipt")


def check_limit(what: str, count: Any, limit: int) -> None:
    """Raise LimitError if a cache declares fewer than 1 or more than `most` of something, or no whole number."""
    # Not isinstance: True is an int, too.
    if type(count) is not int or not 1 <= count <= limit:
        raise LimitError(
            f"the cache declares {count!r:.40} {what}; possible are 1 to {limit}: it is damaged, or not to be trusted"
        )


def _parsed(kind: type[T], fields: dict[str, Any], what: str) -> T:
    """Parse a dataclass from JSON.

    Raises:
        CorruptShardError: naming `what`, for fields that are not those of this version.
    """
    try:
        return from_json(kind, fields)
    except LimitError as exc:
        raise LimitError(f"{what}: {exc}") from exc
    except ValueError as exc:
        raise CorruptShardError(f"{what} does not have the fields of format version {FORMAT_VERSION}: {exc}") from exc


def _refuse_newer_containers(containers: Any, place: str) -> None:
    """Raise UnsupportedFormatError for a container of an unknown kind with unknown fields."""
    for item in containers if isinstance(containers, list) else []:
        document = cast(dict[str, Any], item if isinstance(item, dict) else {})
        unknown = document.keys() - {field.name for field in fields(Container)}
        if unknown and document.get("kind") not in CONTAINER_KINDS:
            raise UnsupportedFormatError(
                f"{place}: images lie in a container of kind {document.get('kind')!r:.40} with {min(unknown)!r:.40}, which this "
                "radio-cache does not know: install a newer one"
            )


def _sealed(data: dict[str, Any]) -> dict[str, Any]:
    """Return the document with its checksum, which does not depend on layout or order of fields."""
    return data | {"crc32c": crc32c(json.dumps(data, sort_keys=True, separators=(",", ":")).encode())}


def _unsealed(data: dict[str, Any], what: str) -> dict[str, Any]:
    """Return the document without its checksum.

    Raises:
        CorruptShardError: naming `what`, for a wrong checksum. The first caches have none, which is no error.
    """
    fields = dict(data)
    try:
        if "crc32c" not in fields or fields.pop("crc32c") == _sealed(fields)["crc32c"]:
            return fields
    except (ValueError, RecursionError):
        pass  # not JSON, so the checksum was never computed for it
    raise CorruptShardError(f"{what} does not match its own checksum: restore it from a copy")


def receipts_folder(unit: str) -> str:
    """Path of the folder with a unit's receipts, below the cache."""
    return f"receipts/{unit}"


def receipt_path(unit: str, shard: int) -> str:
    """Path of a receipt that is a file of its own, below the cache."""
    return f"{receipts_folder(unit)}/{shard:06d}.json"


def level_name(teacher: str, input_hw: tuple[int, int]) -> str:
    """Group of a further input size of a teacher: `clip@448`."""
    return f"{teacher}@{input_hw[0]}"


def unit_group(unit: str) -> str:
    """Path of the group a unit writes to, below the cache."""
    return unit if unit == IMAGES_UNIT else f"teachers/{unit}"
