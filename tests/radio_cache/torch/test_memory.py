"""A lack of memory is recognised in all the words that torch has for it."""

import pytest
import torch

from radio_cache.torch.memory import is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
        RuntimeError("Cannot allocate memory"),
    ],
)
def test_an_error_about_memory_is_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("unsupported memory format"), ValueError("out of memory")])
def test_an_error_about_something_else_is_not(error: Exception) -> None:
    assert not is_out_of_memory(error)
