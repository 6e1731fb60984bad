"""Stage 2: students, adaptor heads, losses, recipes, and the trainer that reads cached features."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.loop import TrainReport, train
    from trainer.model.files import load_student
    from trainer.model.student import DistilledStudent, StudentConfig
    from trainer.recipes.recipe import Recipe
    from trainer.train_config import TrainConfig

__all__ = ["DistilledStudent", "Recipe", "StudentConfig", "TrainConfig", "TrainReport", "load_student", "train"]

__distribution__ = "radio-cache"  # by which `radio_cache.start` knows our packages

_MODULES = {
    "DistilledStudent": "trainer.model.student",
    "Recipe": "trainer.recipes.recipe",
    "StudentConfig": "trainer.model.student",
    "TrainConfig": "trainer.train_config",
    "TrainReport": "trainer.loop",
    "load_student": "trainer.model.files",
    "train": "trainer.loop",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch takes seconds, and neither recipes nor `--help` need it."""
    if name not in _MODULES:
        raise AttributeError(f"module 'trainer' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)
