"""Whether a cache's own list of images still says what the sources hold, so that nothing need be listed again.

A build keeps beside the list when every folder it looked into, and every tar, Parquet file and list, was changed last. A folder's
time changes when an entry comes, goes or is renamed; so if all times are as they were, listing again would find the same.
The prefix of a bucket has no such time: whatever lies loose in one is listed each time.
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
from radio_cache.prefetch.ordered import ahead
from radio_cache.reader import Cache
from radio_cache.storage.base import is_url

LISTING_FILE = "listing.json"
"""Below the root of a cache; whoever removes it makes the next build list again."""

_RULES = 2
"""Raised whenever the same sources give other images, classes or places than an earlier version found in them: what that one
recorded is then listed again. 2: classes of samples in tars, sparse and linked members, missing classes, headers of TSV files."""

_SETTLED_NS = 2_000_000_000
"""Whatever changed less than this before it was looked at may change again within the same tick of its clock."""

REQUESTS_AT_ONCE = 32
"""To a bucket, whose answers take long and cost nothing here."""

_MAX_STAMPS = 200_000

Stamps = dict[str, tuple[int, int]]
"""Path -> (time of its last change in nanoseconds, bytes; 0 of a folder)."""


@dataclass(frozen=True, kw_only=True)
class ListingRequest:
    """All that decides which images a build has, and in what order. sources: as typed. member: as of `list_images`."""

    sources: tuple[str, ...]
    selection: Selection
    member: str = ""

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        del data["sources"]
        # Patterns match other files tomorrow, and links lead elsewhere.
        places = [expand_source(source) for source in self.sources]
        return json.loads(json.dumps({**data, "places": places, "rules": _RULES}))


def stamps_of(paths: Iterable[str]) -> Stamps:
    """When these files and folders, at paths or URLs, were changed last. Raises OSError if one is gone, StorageError for
    a bucket that does not answer."""
    stamps: Stamps = {}
    remote: list[str] = []
    for path in paths:
        if is_url(path):
            remote.append(path)
            continue
        status = os.stat(path)  # noqa: PTH116  # a folder for every class, or for every image: no Path for each
        stamps[path] = (status.st_mtime_ns, 0 if stat.S_ISDIR(status.st_mode) else status.st_size)
    if remote:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="stamps") as pool:
            stamps.update(ahead(pool, lambda url: (url, _remote_stamp(url)), remote, depth=2 * REQUESTS_AT_ONCE))
    return stamps


def never_trusted() -> tuple[int, int]:
    """The stamp of what has no time of its own: a moment ago, which is never settled."""
    return (time.time_ns(), 0)


def _remote_stamp(url: str) -> tuple[int, int]:
    status = remote_status(url)
    if status.changed_ns is None or status.num_bytes is None:
        return never_trusted()
    return (status.changed_ns, status.num_bytes)


def record(cache: Cache, request: ListingRequest, stamps: Stamps, *, listed_at_ns: int) -> None:
    """Keep what a later build needs to trust the cache's list of images.

    listed_at_ns: the time before anything was looked at. No stamps are kept where something changed just then.
    """
    newest = max((changed for changed, _ in stamps.values()), default=0)
    settled = newest <= listed_at_ns - _SETTLED_NS and len(stamps) <= _MAX_STAMPS
    document = {"index": cache.meta.index, "request": request.to_json(), "stamps": stamps if settled else None}
    cache.storage.write(LISTING_FILE, [json.dumps(document).encode()])


_FLAGS = {"shuffle_seed": "--shuffle-seed", "limit": "--limit", "filters": "--filter", "member": "--member"}


def _settings(request: dict[str, Any]) -> dict[str, Any]:
    return {"member": request.get("member") or None, **request["selection"]}


def selection_changes(cache: Cache, request: ListingRequest) -> list[str]:
    """How a request chooses other images, or in another order, than the one a cache was made by, option by option; nothing
    where that was not recorded."""
    try:
        document = parse_json(cache.storage.read_at_most(LISTING_FILE, MAX_DOCUMENT_BYTES))
        if document["index"] != cache.meta.index:
            return []
        then, now = _settings(document["request"]), _settings(request.to_json())
        return [
            f"{flag} was {_given(then[name])} when the cache was made, and is {_given(now[name])} now"
            for name, flag in _FLAGS.items()
            if then[name] != now[name]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StoreError):
        return []


def recorded_request(cache: Cache) -> ListingRequest | None:
    """Return the request that a cache's list of images was made by, with its places as sources; None if it is not recorded."""
    try:
        document = parse_json(cache.storage.read_at_most(LISTING_FILE, MAX_DOCUMENT_BYTES))
        if document["index"] != cache.meta.index:
            return None
        request = document["request"]
        selection = request["selection"]
        sources = tuple(str(place) for places in request["places"] for place in places)
        chosen = Selection(
            filters=tuple(map(str, selection["filters"])),
            shuffle_seed=selection["shuffle_seed"],
            limit=selection["limit"],
        )
        return ListingRequest(sources=sources, selection=chosen, member=str(request.get("member") or ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StoreError, ConfigError):
        return None


def record_moved_sources(cache: Cache, sources: Sequence[str]) -> None:
    """Have what a cache recorded of its request name the places where the same images are now; they are listed anew next time."""
    try:
        document = parse_json(cache.storage.read_at_most(LISTING_FILE, MAX_DOCUMENT_BYTES))
        request = {**document["request"], "places": [expand_source(source) for source in sources]}
        moved = {"index": document["index"], "request": request, "stamps": None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StoreError):
        return  # nothing is recorded that could name the place of before: the cache's own containers are taken
    cache.storage.write(LISTING_FILE, [json.dumps(moved).encode()])


def is_listed_by_older_version(cache: Cache) -> bool:
    """Return whether an earlier version listed a cache's images, which took other classes or places from the same sources."""
    try:
        document = parse_json(cache.storage.read_at_most(LISTING_FILE, MAX_DOCUMENT_BYTES))
        return document["index"] == cache.meta.index and document["request"].get("rules", 1) != _RULES
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StoreError):
        return False


def _given(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, cast(list[Any], value))) or "not given"
    return "not given" if value is None else str(value)


def is_unchanged(cache: Cache, request: ListingRequest) -> bool:
    """Return whether listing again would surely find just what the cache has."""
    try:
        document = parse_json(cache.storage.read_at_most(LISTING_FILE, MAX_DOCUMENT_BYTES))
        stamps = {path: tuple(stamp) for path, stamp in document["stamps"].items()}
        return (
            document["index"] == cache.meta.index
            and document["request"] == request.to_json()
            and stamps_of(stamps) == stamps
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SourceError, StoreError):
        return False  # whatever it is, listing again says it better
