"""The processes of a run: one, or as many as `torchrun` started. What they tell each other is sums.

Gradients are summed by ourselves, in buckets, once a step: every pass is already weighted by its share of the step
(`trainer.data.schedule`), and processes that ask different teachers have gradients for different heads, which a wrapper that
averages over all processes gets wrong (docs/design/008-training.md).
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from radio_cache.errors import ConfigError

_BUCKET_VALUES = 8 << 20


@final
class Processes:
    """rank: this process, from 0. world: how many. With one there is no communication at all."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @classmethod
    def joined(cls, device: torch.device) -> "Processes":
        """This process among those of torchrun, by the environment it sets; alone without it."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        if not dist.is_available():
            raise ConfigError("this PyTorch has no torch.distributed: start one process, without torchrun")
        if not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=30))
        return cls(dist.get_rank(), world)

    @property
    def is_first(self) -> bool:
        """Return whether this process writes files and speaks to the user."""
        return self.rank == 0

    def leave(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    def wait_for_all(self) -> None:
        if self.world > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Each gradient becomes the sum over the processes that have one; where none has, there is none, as with one process."""
        if self.world == 1:
            return
        device = parameters[0].device
        there = self.sum(torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device))
        wanted = [p for p, count in zip(parameters, there.tolist(), strict=True) if count]
        bucket: list[nn.Parameter] = []
        size = 0
        for number, parameter in enumerate(wanted, start=1):
            bucket.append(parameter)
            size += parameter.numel()
            if size >= _BUCKET_VALUES or number == len(wanted):
                self._sum_bucket(bucket)
                bucket, size = [], 0

    def _sum_bucket(self, parameters: Sequence[nn.Parameter]) -> None:
        parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
        flat = self.sum(torch.cat([part.float() for part in parts]))
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            # Strides of the parameter, too: the optimiser's fused loops want them alike.
            parameter.grad = torch.empty_like(parameter).copy_(part.view_as(parameter))

    def average_present(self, values: Tensor, present: Tensor) -> None:
        """Make each value its mean over the processes for which it is present, in place; others stay as they are."""
        if self.world == 1:
            return
        summed, counts = self.sum(values * present), self.sum(present.clone())
        values.copy_(torch.where(counts > 0, summed / counts.clamp(min=1), values))
