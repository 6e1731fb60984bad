"""Stage 1: run teachers over images and write their features to a cache.

`build_cache(BuildConfig(...))` is what `radio-cache build` calls.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cache_builder.build import BuildReport, build_cache
    from cache_builder.build_config import BuildConfig

__all__ = ["BuildConfig", "BuildReport", "build_cache"]

__distribution__ = "radio-cache"  # by which `radio_cache.start` knows our packages


def __getattr__(name: str) -> Any:
    # Imported when first asked for: torch takes seconds, and commands such as `radio-cache info` do without it.
    if name == "BuildConfig":
        from cache_builder.build_config import BuildConfig

        return BuildConfig
    if name in ("BuildReport", "build_cache"):
        from cache_builder import build

        return getattr(build, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
