"""Paths inside a cache: relative, and never out of it."""

import re

from radio_cache.errors import StorageError

# Control characters, backslashes (separators on Windows), and surrogates, which no encoding has.
_ODD = re.compile("[\0-\x1f\x7f\\\\\ud800-\udfff]")


def checked_path(path: str) -> str:
    """Return the path unchanged.

    Raises:
        StorageError: if it is absolute or climbs out of the root, as a hostile cache might try.
    """
    if path and (_ODD.search(path) or any(part in ("", ".", "..") for part in path.split("/"))):
        raise StorageError(f"{path!r} is not a path inside a cache: the cache that asks for it is not to be trusted")
    return path
