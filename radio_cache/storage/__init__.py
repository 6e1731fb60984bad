"""Storage of caches: a local disk or a bucket."""

from collections.abc import Mapping
from pathlib import Path

from radio_cache.errors import ConfigError
from radio_cache.storage.base import BUCKETS, URL_PATTERN, Storage


def open_storage(place: "str | Path | Storage", *, options: Mapping[str, str] | None = None) -> "Storage":
    """Return the storage at a path, or at a URL: s3://bucket/prefix, gs://, az://, file://.

    options: settings of obstore's store for URLs, such as {"endpoint": "http://127.0.0.1:8333"}; what is not given comes
    from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...; docs/cloud.md). Nothing is read yet.
    Raises ConfigError for a URL of an unknown kind.
    """
    if isinstance(place, Storage):
        return place
    from radio_cache.storage.local import LocalStorage  # here, since both storages import this package

    scheme_match = URL_PATTERN.match(place) if isinstance(place, str) else None
    if scheme_match is None:
        return LocalStorage(place)
    if scheme_match[1].lower() == "file":
        return LocalStorage(str(place)[len(scheme_match[0]) :])
    if scheme_match[1].lower() not in BUCKETS:
        raise ConfigError(f"{place}: a cache lies in a folder, or at a URL with one of {', '.join(BUCKETS)}, file")
    from radio_cache.storage.buckets import ObjectStorage

    return ObjectStorage(str(place), options=options)
