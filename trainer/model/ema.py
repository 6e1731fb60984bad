"""The moving average of a student's weights, which a run exports if its recipe has one."""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from trainer.distributed.fsdp import divided


@final
class Ema:
    """ema <- decay * ema + (1 - decay) * weights, for all parameters.

    Buffers, such as a norm's statistics, are not averaged.

    C-RADIOv4 (arXiv 2601.17237) uses 0.9996. In the first steps the decay is (1 + n) / (10 + n), if that is less.
    """

    def __init__(self, modules: Sequence[nn.Module], decay: float) -> None:
        # References, so that an update reads the present values.
        self._parameters = [p for module in modules for p in module.parameters()]
        self._decay, self._updates = decay, 0
        self._average = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Update the average after an optimiser step."""
        # A short average first, because the weights of the start would stay in a long one for thousands of steps.
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        self._updates += 1
        for average, parameter in zip(self._average, self._parameters, strict=True):
            # average + (1 - decay) * (parameter - average), in place
            average.lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Copy the average into the modules."""
        for parameter, average in zip(self._parameters, self._average, strict=True):
            parameter.copy_(average)

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the number of updates, for a checkpoint."""
        return {"updates": self._updates, "average": self._average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._updates = int(state["updates"])
        loaded: list[Tensor] = state["average"]
        for mine, saved in zip(self._average, loaded, strict=True):
            # A checkpoint holds whole tensors; under FSDP each process takes its shard of them.
            mine.copy_(divided(saved, mine))
