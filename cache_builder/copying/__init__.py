"""Copies of a cache or of a part of it, in the same packing or in another one."""

from cache_builder.copying.config import CopyConfig
from cache_builder.copying.copy import CopyReport, copy_cache

__all__ = ["CopyConfig", "CopyReport", "copy_cache"]
