"""Semantic segmentation by a linear probe on frozen maps."""

from evals.segmentation.table import SegmentConfig, SegmentTable, run_segment

__all__ = ["SegmentConfig", "SegmentTable", "run_segment"]
