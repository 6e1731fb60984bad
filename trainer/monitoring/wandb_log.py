"""Weights & Biases, for those who ask for it: a run there that is told what TensorBoard is told. Not a dependency.

Nothing is imported, and nothing sent, unless a project was named. `WANDB_MODE=offline` keeps it on the disk, for `wandb sync`.
"""

import importlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from radio_cache.errors import ConfigError
from trainer.recipes.recipe import Recipe

ID_FILE = "wandb-id"


@final
class WandbLog:
    """One run of a project; a run that goes on after a stop is the same one there, by the id in its folder."""

    def __init__(self, project: str, out: Path, recipe: Recipe) -> None:
        """Raises ConfigError without the package."""
        wandb = _package()
        id_file = out / ID_FILE
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        self._run: Any = wandb.init(
            project=project,
            dir=str(out),
            id=id_file.read_text(),
            resume="allow",
            name=out.resolve().name,
            config=recipe.to_json(),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def refuse_missing_package() -> None:
    """Raise ConfigError if `wandb` is not installed: before a run begins, not after."""
    _package()


def _package() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as exc:
        raise ConfigError(
            "--wandb needs the package of Weights & Biases, which is not installed: pip install wandb, or leave --wandb out "
            "(metrics.jsonl and TensorBoard are written anyway)"
        ) from exc
