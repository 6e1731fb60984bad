"""An optional log to Weights & Biases, with the scalars that TensorBoard gets. The package is not a dependency.

Nothing is imported or sent unless a project is named. `WANDB_MODE=offline` keeps the log on the disk, for `wandb sync`.
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
    """A run in a project of Weights & Biases. A resumed run continues it, by the id in the run's folder."""

    def __init__(self, project: str, out: Path, recipe: Recipe) -> None:
        """Start or resume the run. Raises ConfigError if `wandb` is not installed."""
        wandb = _package()
        # Chosen here, not by the service, so that a run that was killed at once resumes as the same one.
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
        """Log scalars by name."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run and upload what is left."""
        self._run.finish()


def refuse_missing_package() -> None:
    """Raise ConfigError if `wandb` is not installed; called before a run begins."""
    _package()


def _package() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as exc:
        raise ConfigError(
            "--wandb needs the package of Weights & Biases, which is not installed: pip install wandb, or leave --wandb out "
            "(metrics.jsonl and TensorBoard are written anyway)"
        ) from exc
