"""Stage 2: students, adaptor heads, losses, recipes, and the trainer that reads cached features."""

from trainer.loop import TrainReport, train
from trainer.model.files import load_student
from trainer.model.student import DistilledStudent, StudentConfig
from trainer.recipes.recipe import Recipe
from trainer.train_config import TrainConfig

__all__ = ["DistilledStudent", "Recipe", "StudentConfig", "TrainConfig", "TrainReport", "load_student", "train"]

__distribution__ = "radio-cache"  # by which `radio_cache.start` knows our packages
