"""Evaluation of a student as SAM's image encoder: masks of COCO's instances, beside those of SAM itself."""

from evals.sam.table import SamConfig, SamTable, run_sam

__all__ = ["SamConfig", "SamTable", "run_sam"]
