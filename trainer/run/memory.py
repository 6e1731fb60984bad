"""Out-of-memory errors that name the settings to change, and activation checkpointing."""

import contextlib
import functools
from collections.abc import Generator
from typing import Any, cast

import torch
from torch.utils.checkpoint import checkpoint

from radio_cache.errors import ConfigError, TrainingError
from radio_cache.torch.memory import is_out_of_memory
from trainer.students import Student
from trainer.students.timm_backbone import TimmBackbone
from trainer.students.transformer_block import Block

_NO_THREAD = "can't start new thread"


@contextlib.contextmanager
def explain_out_of_memory() -> Generator[None]:
    """Turn out-of-memory errors of a GPU or of the machine into a TrainingError that names the settings to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as exc:
        if _NO_THREAD in str(exc):
            raise TrainingError(
                "the system starts no more threads for this process: it is short of memory, or of processes (`ulimit -u`, or "
                "a container's limit): raise that, or end others; the same command goes on"
            ) from exc
        if not is_out_of_memory(exc):
            raise
        raise TrainingError(
            f"out of memory ({str(exc).splitlines()[0] if str(exc) else 'refused by the system'}). Try, cheapest first: "
            "--set accumulate=2 (the same, but for batch norms), --set checkpoint_activations=true (the same, a third slower), "
            "--set precision=bfloat16, a smaller --batch-size or --image-size, a smaller student"
        ) from exc


def checkpoint_activations(student: Student) -> None:
    """Make blocks save their inputs alone and compute their activations again in the backward pass.

    Raises:
        ConfigError: the student is neither a ViT nor a model of timm that supports it.
    """
    blocks = [module for module in student.modules() if isinstance(module, Block)]
    for block in blocks:
        # A wrapper module would change the names of parameters, which checkpoints hold.
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if blocks:
        return
    for module in student.modules() if isinstance(student, TimmBackbone) else ():
        setter = cast(Any, getattr(module, "set_grad_checkpointing", None))
        if setter is not None:
            setter(True)
            return
    raise ConfigError(
        f"student '{student.name}' does not support activation checkpointing: --set checkpoint_activations=false"
    )
