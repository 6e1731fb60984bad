"""Students that do not fit on one device: their weights lie divided among the processes (FSDP2, `fully_shard`).

Only the student is divided. Every process calls it once in every pass, whichever teachers it asks, so that all gather the same
weights at the same time; heads and balancings, of which processes call different ones, stay whole everywhere. Checkpoints
hold whole weights, and are the same with and without (docs/design/008-training.md).
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
    """Divide the weights among the processes: each block of a transformer by itself, and what is left together.

    Gradients become sums over the processes, as `Processes.sum_gradients` makes them. Raises ConfigError for one process.
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
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum


def is_sharded(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor)


def whole(state: Any, *, keep: bool) -> Any:
    """A state dict with whole tensors on the CPU in place of divided ones. All processes call this; keep: this one wants it."""
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if keep else None
    if isinstance(state, Mapping):
        return {key: whole(value, keep=keep) for key, value in cast(Mapping[Any, Any], state).items()}
    if isinstance(state, list | tuple):
        return [whole(value, keep=keep) for value in cast(Sequence[Any], state)]
    return state


def divided(value: Any, like: Any) -> Any:
    """This process's part of a whole tensor, where `like` is divided; anything else as it is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    # Every process has read the same file: nothing need be sent.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> None:
    """Scale all gradients so that their norm over all of them, whole and divided, is at most this."""
    kinds = [[p for p in parameters if is_sharded(p) == kind and p.grad is not None] for kind in (False, True)]
    if not kinds[1]:
        nn.utils.clip_grad_norm_(parameters, max_norm)
        return
    norms: list[Tensor] = []
    for kind in kinds:
        norm = nn.utils.get_total_norm([cast(Tensor, p.grad) for p in kind])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.stack(norms).norm()
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, max_norm, total)
