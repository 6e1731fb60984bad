"""Copying a cache, or a part of it, to another place, in the same packing or the other one."""

from cache_builder.copying.config import CopyConfig
from cache_builder.copying.copy import CopyReport, copy_cache

__all__ = ["CopyConfig", "CopyReport", "copy_cache"]
