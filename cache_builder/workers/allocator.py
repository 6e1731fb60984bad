"""Settings of the memory allocator for forward passes on a CPU.

Each pass allocates its activations in blocks of megabytes. glibc returns such blocks to the system as soon as they are freed,
so every pass has them mapped and zeroed again. With a small network that is three tenths of the CPU seconds (docs/log.md).
"""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_MAX_KEPT_BYTES = (1 << 31) - 1
"""Free bytes kept at the end of the heap. glibc takes no larger number."""


def allocator_environment() -> dict[str, str]:
    """Return environment variables with which a process keeps freed memory from its start; none if ours decide already."""
    if _is_decided():
        return {}
    return {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(_MAX_KEPT_BYTES), "MALLOC_ARENA_MAX": "1"}


def keep_freed_memory() -> bool:
    """Make this process keep up to 2 GiB that it frees. Call it in a program of its own, before it starts threads.

    All threads share the heap of the first one, whatever a block's size, because other heaps end at 64 MiB.

    Returns:
        Whether it was possible. It is not with another C library than glibc, nor if the environment decides already
        (MALLOC_..., GLIBC_TUNABLES).
    """
    if _is_decided():
        return False
    try:
        # Looked up in the running process, which fails with another C library than glibc.
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    parameters = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _MAX_KEPT_BYTES), (_M_ARENA_MAX, 1))
    return all(mallopt(name, value) == 1 for name, value in parameters)


def _is_decided() -> bool:
    return any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
