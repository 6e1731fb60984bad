"""Memory from the start of a page on."""

import mmap

import numpy as np

from radio_cache.prefetch.page_memory import page_array


def test_arrays_begin_with_a_page_and_can_be_written() -> None:
    array = page_array((3, 5, 7), np.int16)
    assert array.shape == (3, 5, 7)
    assert array.dtype == np.int16
    assert array.ctypes.data % mmap.PAGESIZE == 0
    assert array.flags.c_contiguous
    assert not array.any()
    array[:] = 4
    assert array.sum() == 4 * 3 * 5 * 7


def test_an_array_without_elements() -> None:
    assert page_array((0, 4), np.float32).shape == (0, 4)


def test_memory_outlives_everything_but_its_views() -> None:
    view = page_array((4, 1 << 20), np.uint8)[2]
    view[:] = 9
    assert view.max() == 9
