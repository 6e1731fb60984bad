"""A student as LLaVA's vision tower: whether it is wired right, and what a LLaVA trained with it answers."""

from evals.vlm.harness import TASKS, HarnessConfig, VlmTable, run_harness
from evals.vlm.wiring import Wiring, check_wiring

__all__ = ["TASKS", "HarnessConfig", "VlmTable", "Wiring", "check_wiring", "run_harness"]
