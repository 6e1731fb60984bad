"""The compiled code of `radio_cache.native._rows`, or None.

It is None where it was not built, or with RADIO_CACHE_PURE_PYTHON=1.
"""

import os
from typing import Any

_VERSION = 2


def _found() -> Any:
    if os.environ.get("RADIO_CACHE_PURE_PYTHON"):
        return None
    try:
        from radio_cache.native import _rows
    except ImportError:
        return None
    # One built before the last update is no longer understood: Python does its work until the next `pip install`.
    return _rows if getattr(_rows, "VERSION", None) == _VERSION else None


rows: Any = _found()
