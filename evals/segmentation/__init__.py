"""Semantic segmentation by a linear probe on frozen maps: how much of what is where do the features know?"""

from evals.segmentation.table import SegmentConfig, SegmentTable, run_segment

__all__ = ["SegmentConfig", "SegmentTable", "run_segment"]
