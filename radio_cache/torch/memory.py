"""Recognise errors of torch that mean a lack of memory."""

import torch

OUT_OF_MEMORY_PHRASES = ("out of memory", "not enough memory", "can't allocate memory", "Cannot allocate memory")
"""Wording of torch on GPUs and on CPUs. Whole phrases, because other errors speak of memory too, such as of its format."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory is short, on a GPU or in the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # Main memory runs out without a type of its own.
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in OUT_OF_MEMORY_PHRASES)
