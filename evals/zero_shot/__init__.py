"""Zero-shot classification: images are compared with sentences about classes, and nothing is trained on their labels."""

from evals.zero_shot.table import ZeroShotConfig, ZeroShotTable, run_zero_shot

__all__ = ["ZeroShotConfig", "ZeroShotTable", "run_zero_shot"]
