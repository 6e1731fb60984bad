"""What a run is asked to do: which cache, which recipe, where to."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from trainer.data.shard_cache import DEFAULT_BYTES
from trainer.recipes.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run: which cache, which teachers (none named: all of them), which recipe, where to, on what.

    allow_partial: train on the images that are there, of a cache that is not finished.
    wandb: a project of Weights & Biases that is told the same as TensorBoard; by default nobody is.
    shard_cache_bytes: memory for whole shards, where the images are shuffled by blocks.
    """

    cache: str | Path
    recipe: Recipe
    out: Path
    teachers: tuple[str, ...] = ()
    device: str = "cpu"
    allow_partial: bool = False
    wandb: str | None = None
    data_threads: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))
    shard_cache_bytes: int = DEFAULT_BYTES
