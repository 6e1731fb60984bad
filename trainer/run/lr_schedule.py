"""The learning-rate schedule."""

import math

from trainer.recipes.recipe import Stage


def lr_at(step: int, stage: Stage) -> float:
    """Return the learning rate of a stage's step: linear warm-up to `lr`, then half a cosine to zero after the last step."""
    if step < stage.warmup_steps:
        return stage.lr * (step + 1) / stage.warmup_steps
    # max: a stage may be all warm-up
    share = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    return stage.lr * 0.5 * (1 + math.cos(math.pi * share))
