"""The record that lets a build reuse a cache's list of images instead of listing unchanged sources again.

A build records the time of the last change of every folder, tar, Parquet file and list that it listed. The time of a folder
changes when an entry is added, removed or renamed. So if all times are the same, listing again would give the same images.
A prefix of a bucket has no such time: loose images in a bucket are listed by every build.
"""

import json
import os
import stat
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, cast

from cache_builder.sources.images_option import expand_source
from cache_builder.sources.selection import Selection
from radio_cache.errors import ConfigError, SourceError, StoreError
from radio_cache.format.strict_json import parse_json
from radio_cache.format.zarr_json import MAX_DOCUMENT_BYTES
from radio_cache.images.remote import remote_status
from radio_cache.prefetch.ordered import prefetch_map
from radio_cache.reader import Cache
from radio_cache.storage.base import is_url

LISTING_FILE = "listing.json"
"""File below the root of a cache. Without it the next build lists the sources again."""

_RULES = 2
"""Version of the listing rules. It is increased whenever the same sources give other images, classes or offsets than before;
a record of an older version is then ignored. 2: classes of samples in tars, sparse and linked members, missing classes, headers
of TSV files."""

_SETTLED_NS = 2_000_000_000
"""A file that changed less than this before it was listed may change again within the same tick of its clock."""

REQUESTS_AT_ONCE = 32
"""Parallel requests to buckets. They spend their time waiting for the network and use no CPU."""

_MAX_STAMPS = 200_000
"""Limit of recorded stamps: a tree of a million folders is listed again instead of storing a time for each."""

Stamps = dict[str, tuple[int, int]]
"""Path -> (time of its last change in nanoseconds, bytes; 0 of a folder)."""


@dataclass(frozen=True, kw_only=True)
class ListingRequest:
    """All settings that decide the images of a build and their order."""

    sources: tuple[str, ...]
    """Arguments of `--images` as typed."""

    selection: Selection

    member: str = ""
    """Extensions of the photos in tars, as in `list_images`."""

    def to_json(self) -> dict[str, Any]:
        """Return the request as it is recorded, with all patterns and links resolved.

        Raises:
            SourceError: a source does not exist.
        """
        data = asdict(self)
        del data["sources"]
        # The arguments themselves prove nothing: tomorrow a pattern may match other files, and a link lead elsewhere.
        paths = [expand_source(source) for source in self.sources]
        # Through JSON and back, so that it compares equal to a record that was read (tuples become lists).
        return json.loads(json.dumps({**data, "places": paths, "rules": _RULES}))


def stamps_of(paths: Iterable[str]) -> Stamps:
    """Return the last change of each of these files and folders, at paths or URLs.

    Raises:
        OSError: a file or folder does not exist.
        StorageError: a bucket does not answer.
    """
    stamps: Stamps = {}
    remote: list[str] = []
    for path in paths:
        if is_url(path):
            remote.append(path)
            continue
        status = os.stat(path)  # noqa: PTH116  # a folder for every class, or for every image: no Path for each
        stamps[path] = (status.st_mtime_ns, 0 if stat.S_ISDIR(status.st_mode) else status.st_size)
    # Each remote stamp is a request: they are sent in parallel.
    if remote:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="stamps") as pool:
            stamps.update(prefetch_map(pool, lambda url: (url, _remote_stamp(url)), remote, depth=2 * REQUESTS_AT_ONCE))
    return stamps


def never_trusted() -> tuple[int, int]:
    """Return the stamp of a source without a time of change: the current time, which never counts as settled."""
    return (time.time_ns(), 0)


def _remote_stamp(url: str) -> tuple[int, int]:
    """Return the stamp of a file at a URL."""
    status = remote_status(url)
    if status.changed_ns is None or status.num_bytes is None:
        return never_trusted()
    return (status.changed_ns, status.num_bytes)


def record(cache: Cache, request: ListingRequest, stamps: Stamps, *, listed_at_ns: int) -> None:
    """Write what a later build compares before it reuses the cache's list of images.

    No stamps are written if a source changed just before it was listed.

    Args:
        cache: the cache with these images.
        request: the settings that the images were listed with.
        stamps: last changes of all listed folders and files.
        listed_at_ns: time before the first source was listed.
    """
    # A file that changed within the last tick of the clock may change once more without a new time.
    newest = max((changed for changed, _ in stamps.values()), default=0)
    settled = newest <= listed_at_ns - _SETTLED_NS and len(stamps) <= _MAX_STAMPS
    document = {"index": cache.meta.index, "request": request.to_json(), "stamps": stamps if settled else None}
    cache.storage.write(LISTING_FILE, [json.dumps(document).encode()])


_FLAGS = {"shuffle_seed": "--shuffle-seed", "limit": "--limit", "filters": "--filter", "member": "--member"}


def _settings(request: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a recorded request by the keys of `_FLAGS`."""
    # Records of older versions have no member.
    return {"member": request.get("member") or None, **request["selection"]}


def selection_changes(cache: Cache, request: ListingRequest) -> list[str]:
    """Return the options that select or order images otherwise than those the cache was built with, one message each.

    The list is empty if the cache has no record.
    """
    try:
        document = parse_json(cache.storage.read_at_most(LISTING_FILE, MAX_DOCUMENT_BYTES))
        # The record belongs to another index, such as one that a later build replaced.
        if document["index"] != cache.meta.index:
            return []
        old, new = _settings(document["request"]), _settings(request.to_json())
        return [
            f"{flag} was {_setting_text(old[name])} when the cache was made, and is {_setting_text(new[name])} now"
            for name, flag in _FLAGS.items()
            if old[name] != new[name]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StoreError):
        return []


def recorded_request(cache: Cache) -> ListingRequest | None:
    """Return the request that a cache was built with, with resolved paths as sources; None if it is not recorded."""
    try:
        document = parse_json(cache.storage.read_at_most(LISTING_FILE, MAX_DOCUMENT_BYTES))
        if document["index"] != cache.meta.index:
            return None
        request = document["request"]
        selection = request["selection"]
        # "places": one list of resolved paths for each argument of --images.
        sources = tuple(str(path) for paths in request["places"] for path in paths)
        recorded_selection = Selection(
            filters=tuple(map(str, selection["filters"])),
            shuffle_seed=selection["shuffle_seed"],
            limit=selection["limit"],
        )
        return ListingRequest(sources=sources, selection=recorded_selection, member=str(request.get("member") or ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StoreError, ConfigError):
        return None


def record_moved_sources(cache: Cache, sources: Sequence[str]) -> None:
    """Write the new locations of moved images into a cache's record. The next build lists them again.

    Args:
        cache: the cache.
        sources: new paths and URLs, in the order of the recorded ones.
    """
    try:
        document = parse_json(cache.storage.read_at_most(LISTING_FILE, MAX_DOCUMENT_BYTES))
        request = {**document["request"], "places": [expand_source(source) for source in sources]}
        updated = {"index": document["index"], "request": request, "stamps": None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StoreError):
        return  # no record that names an old location: a build uses the containers of the cache
    cache.storage.write(LISTING_FILE, [json.dumps(updated).encode()])


def is_listed_by_older_version(cache: Cache) -> bool:
    """Return whether a cache's images were listed by older rules, which give other classes or offsets for the same sources."""
    try:
        document = parse_json(cache.storage.read_at_most(LISTING_FILE, MAX_DOCUMENT_BYTES))
        return document["index"] == cache.meta.index and document["request"].get("rules", 1) != _RULES
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StoreError):
        return False


def _setting_text(value: Any) -> str:
    """Return the value of an option as in the messages of `selection_changes`."""
    if isinstance(value, list):
        return " ".join(map(str, cast(list[Any], value))) or "not given"
    return "not given" if value is None else str(value)


def is_unchanged(cache: Cache, request: ListingRequest) -> bool:
    """Return whether listing the sources again would certainly give the images that the cache has."""
    try:
        document = parse_json(cache.storage.read_at_most(LISTING_FILE, MAX_DOCUMENT_BYTES))
        stamps = {path: tuple(stamp) for path, stamp in document["stamps"].items()}
        return (
            document["index"] == cache.meta.index
            and document["request"] == request.to_json()
            and stamps_of(stamps) == stamps
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SourceError, StoreError):
        return False  # listing again reports the same problem with its cause
