"""Memory for batches: from the start of a page on, in large pages, so that reads into it run at full speed."""

import contextlib
import math
import mmap
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


def page_array(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Return a new array of zeros that begins at a page.

    NumPy's own large arrays begin 16 bytes into a page. A copy whose target lies just behind its source, modulo 4,096,
    runs at a third of the speed on some processors. On Linux the array uses pages of 2 MB.
    """
    item_type = np.dtype(dtype)
    num_bytes = math.prod(shape) * item_type.itemsize
    # Python's anonymous maps are shared with forked children by default; a private one is copied on write.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    # mmap refuses a length of 0.
    memory = mmap.mmap(-1, max(1, num_bytes), **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, num_bytes).view(item_type).reshape(shape)
