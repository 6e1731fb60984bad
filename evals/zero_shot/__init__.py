"""Zero-shot classification: images are compared with sentences about classes; nothing is trained on labels."""

from evals.zero_shot.table import ZeroShotConfig, ZeroShotTable, run_zero_shot

__all__ = ["ZeroShotConfig", "ZeroShotTable", "run_zero_shot"]
