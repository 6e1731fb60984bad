"""The processes of a run: one, or those that `torchrun` started. They communicate by sums.

Gradients are summed once a step, in buckets, without a wrapper such as DDP. Every pass is already weighted by its share of the
step (`trainer.data.schedule`), and processes with different teachers have gradients for different heads, which an average over
all processes gets wrong (docs/design/008-training.md).
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
"""Gradients that are summed in one message: 32 MiB in float32."""


@final
class Processes:
    """The processes of a run, as seen by one of them. A single process does not communicate.

    Args:
        rank: number of this process, from 0.
        world: number of processes.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @classmethod
    def join(cls, device: torch.device) -> "Processes":
        """Join the process group that torchrun describes in the environment; without torchrun, a single process.

        Raises:
            ConfigError: this PyTorch has no torch.distributed.
        """
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
        """True in the process that writes files and prints."""
        return self.rank == 0

    def leave(self) -> None:
        """Leave the process group."""
        if self.world > 1:
            dist.destroy_process_group()

    def wait_for_all(self) -> None:
        """Wait until all processes have called this."""
        if self.world > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place, and return it."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its sum over the processes that have one. A parameter without any stays without."""
        if self.world == 1:
            return
        device = parameters[0].device
        # All processes have to sum the same parameters in the same order, even if some have no gradient for them.
        counts = self.sum(torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device))
        with_gradient = [p for p, count in zip(parameters, counts.tolist(), strict=True) if count]
        bucket: list[nn.Parameter] = []
        size = 0
        for number, parameter in enumerate(with_gradient, start=1):
            bucket.append(parameter)
            size += parameter.numel()
            if size >= _BUCKET_VALUES or number == len(with_gradient):
                self._sum_bucket(bucket)
                bucket, size = [], 0

    def _sum_bucket(self, parameters: Sequence[nn.Parameter]) -> None:
        parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
        # Summed in float32, whatever the precision of the gradients.
        flat = self.sum(torch.cat([part.float() for part in parts]))
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            # With the parameter's strides, which the optimiser's fused loops require.
            parameter.grad = torch.empty_like(parameter).copy_(part.view_as(parameter))

    def average_present(self, values: Tensor, present: Tensor) -> None:
        """Replace each value by its mean over the processes in which it is present, in place.

        Args:
            values: (n,) values; those that are present nowhere stay as they are.
            present: (n,) 1 where this process has the value, else 0.
        """
        if self.world == 1:
            return
        # A process without the value adds 0 to its sum and to its count.
        summed, counts = self.sum(values * present), self.sum(present.clone())
        values.copy_(torch.where(counts > 0, summed / counts.clamp(min=1), values))
