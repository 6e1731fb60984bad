"""Students larger than one device: their weights are sharded among the processes (FSDP2, `fully_shard`).

Only the student is sharded. Every process calls it once in every pass, whatever its teachers, so that all gather the same weights
at the same time. Heads and balancings, of which processes call different ones, are replicated. Checkpoints hold whole weights,
and are the same with and without sharding (docs/design/008-training.md).
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from radio_cache.errors import ConfigError
from trainer.distributed.processes import Processes
from trainer.students import Student
from trainer.students.transformer_block import Block


def shard_student(student: Student, processes: Processes, device: torch.device) -> None:
    """Shard the weights among the processes: each transformer block on its own, and the remaining weights together.

    Gradients become sums over the processes, as `Processes.sum_gradients` makes them.

    Raises:
        ConfigError: there is one process.
    """
    if processes.world == 1:
        raise ConfigError(
            "fsdp=true divides a student among processes, and there is one: start several by torchrun, or --set fsdp=false"
        )
    mesh = init_device_mesh(device.type, (processes.world,))
    blocks = [module for module in student.modules() if isinstance(module, Block)]
    for module in (*blocks, student):
        fully_shard(module, mesh=mesh)
        sharded = cast(FSDPModule, module)
        # Sums, not means: every pass is weighted by its share of the step already.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def is_sharded(parameter: Tensor) -> bool:
    """Return whether a tensor is distributed among processes."""
    return isinstance(parameter, DTensor)


def whole(state: Any, *, keep: bool) -> Any:
    """Return a state dict with sharded tensors gathered on the CPU. All processes call this.

    Args:
        state: nested state dict.
        keep: whether this process needs the gathered tensors; it gets None in their place otherwise.
    """
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if keep else None
    if isinstance(state, Mapping):
        return {key: whole(value, keep=keep) for key, value in cast(Mapping[Any, Any], state).items()}
    if isinstance(state, list | tuple):
        return [whole(value, keep=keep) for value in cast(Sequence[Any], state)]
    return state


def divided(value: Any, like: Any) -> Any:
    """Return this process's shard of a whole tensor if `like` is sharded; any other value unchanged."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    # Every process has read the same file, so that no data need be sent.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> None:
    """Scale all gradients, replicated and sharded, so that their total norm is at most `max_norm`."""
    replicated, sharded = (
        [p for p in parameters if is_sharded(p) == kind and p.grad is not None] for kind in (False, True)
    )
    if not sharded:
        nn.utils.clip_grad_norm_(parameters, max_norm)
        return
    # torch computes no norm over a mixture of plain and distributed tensors.
    norms: list[Tensor] = []
    for group in (replicated, sharded):
        norm = nn.utils.get_total_norm([cast(Tensor, p.grad) for p in group])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.stack(norms).norm()
    for group in (replicated, sharded):
        nn.utils.clip_grads_with_norm_(group, max_norm, total)
