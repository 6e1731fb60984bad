"""Attributes of a cache's Zarr groups, read as JSON: no library, no defaults."""

from typing import Any

from radio_cache.errors import CorruptShardError, NotACacheError
from radio_cache.format.schema import ATTRIBUTES_KEY
from radio_cache.format.strict_json import parse_json
from radio_cache.format.zarr_json import DOCUMENT, MAX_DOCUMENT_BYTES
from radio_cache.storage.base import Storage


class NoGroupError(NotACacheError):
    """There is no group of ours at a place."""


def read_group_attributes(storage: Storage, group: str = "") -> dict[str, Any]:
    """Our attributes of a group. Raises NotACacheError where it is not one of ours, CorruptShardError where it cannot be read."""
    place = storage.at(group)
    path = f"{group}/{DOCUMENT}" if group else DOCUMENT
    try:
        # A limit, because the file may come from an untrusted cache.
        text = storage.read_at_most(path, MAX_DOCUMENT_BYTES)
    except FileNotFoundError as exc:
        # A mistyped path is the usual cause, so on a disk a file, nothing and another folder differ in the message.
        if storage.is_local and storage.local_path(group).is_file():
            raise NotACacheError(f"{place} is a file, not a radio-cache store, which is a folder") from exc
        if storage.is_local and not storage.local_path(group).exists():
            raise NoGroupError(f"{place} does not exist") from exc
        what = "is a folder, but not" if storage.is_local else "does not hold"
        raise NoGroupError(f"{place} {what} a radio-cache store: it has no {DOCUMENT}") from exc
    try:
        document = parse_json(text)
    except ValueError as exc:
        raise CorruptShardError(f"{storage.at(path)} is damaged ({exc}): restore it from a copy") from exc
    try:
        # `.items()` raises for anything but a JSON object.
        return dict(document["attributes"][ATTRIBUTES_KEY].items())
    except (AttributeError, KeyError, TypeError) as exc:
        raise NotACacheError(f"{place} is a Zarr group, but not a radio-cache store") from exc
