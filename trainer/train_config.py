"""The configuration of a training run: cache, recipe, folder, device."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from trainer.data.shard_cache import DEFAULT_BYTES
from trainer.recipes.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The configuration of a run.

    Attributes:
        cache: path or URL of the cache.
        recipe: stages, losses, heads and all other settings that determine the weights.
        out: folder of the run.
        teachers: names of the teachers to learn from; all of the cache if empty.
        device: torch device.
        allow_partial: whether an unfinished cache may be used, with the images that are complete.
        wandb: project of Weights & Biases that scalars are logged to, beside TensorBoard; None for no such log.
        data_threads: threads that decode images.
        shard_cache_bytes: memory for whole shards, if the images are shuffled by blocks.
    """

    cache: str | Path
    recipe: Recipe
    out: Path
    teachers: tuple[str, ...] = ()
    device: str = "cpu"
    allow_partial: bool = False
    wandb: str | None = None
    # On a CPU, the step needs cores, too.
    data_threads: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))
    shard_cache_bytes: int = DEFAULT_BYTES
