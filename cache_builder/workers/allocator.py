"""Memory that forward passes on a CPU use again and again.

A pass allocates its activations anew, in blocks of megabytes. glibc gives such blocks back to the system as soon as they are
freed, so every pass has them mapped and zeroed once more: with a small network three tenths of the CPU seconds (docs/log.md).
"""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_MOST_KEPT = (1 << 31) - 1
"""Bytes at the end of the heap; glibc takes no larger number."""


def allocator_environment() -> dict[str, str]:
    """What has a process do the same from its start, as environment variables; nothing where ours say otherwise."""
    if _is_decided():
        return {}
    return {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(_MOST_KEPT), "MALLOC_ARENA_MAX": "1"}


def keep_freed_memory() -> bool:
    """Have this process keep what it frees, up to 2 GiB; for a program of its own, before it starts threads.

    All threads share the first one's heap, whatever a block's size: other heaps end at 64 MiB. Returns whether it was
    possible: not with another C library than glibc, nor where the environment says otherwise (MALLOC_..., GLIBC_TUNABLES).
    """
    if _is_decided():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    asked = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _MOST_KEPT), (_M_ARENA_MAX, 1))
    return all(mallopt(name, value) == 1 for name, value in asked)


def _is_decided() -> bool:
    return any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
