"""Evaluation of a student as LLaVA's vision tower: a check of the wiring, and benchmarks of a trained LLaVA."""

from evals.vlm.harness import TASKS, HarnessConfig, VlmTable, run_harness
from evals.vlm.wiring import Wiring, check_wiring

__all__ = ["TASKS", "HarnessConfig", "VlmTable", "Wiring", "check_wiring", "run_harness"]
