"""Memory: what to turn down where there is not enough, and blocks that are computed twice instead of kept."""

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
    """Turn "out of memory", of a GPU or of the machine, into a TrainingError that names the settings."""
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
            f"out of memory ({str(exc).splitlines()[0] if str(exc) else 'refused by the system'}). In the order of its price: "
            "--set accumulate=2 (the same, but for batch norms), --set checkpoint_activations=true (the same, a third slower), "
            "--set precision=bfloat16, a smaller --batch-size or --image-size, a smaller student"
        ) from exc


def checkpoint_activations(student: Student) -> None:
    """Blocks keep their inputs alone and are computed again on the way back. For ViTs and models of timm that can.

    Raises ConfigError for a student that has no such blocks.
    """
    blocks = [module for module in student.modules() if isinstance(module, Block)]
    for block in blocks:
        # The method of this object alone: names of parameters stay what they are.
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if blocks:
        return
    for module in student.modules() if isinstance(student, TimmBackbone) else ():
        setter = cast(Any, getattr(module, "set_grad_checkpointing", None))
        if setter is not None:
            setter(True)
            return
    raise ConfigError(
        f"student '{student.name}' has no blocks that can be computed twice: --set checkpoint_activations=false"
    )
