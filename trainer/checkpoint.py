"""Checkpoints: everything a run needs to go on exactly, written aside and renamed; the last two are kept."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from radio_cache.errors import TrainingError
from radio_cache.storage import TEMPORARY, sync_folder

_NAME = re.compile(r"step-(\d{8})\.pt\Z")
_KEEP = 2


@dataclass(frozen=True)
class Trainee:
    """What is trained and saved together."""

    student: nn.Module
    adaptors: nn.Module
    balancing: nn.Module
    optimizer: torch.optim.Optimizer


LossSums = dict[str, list[float]]
"""Losses since the last log line, so that a resumed run logs what an uninterrupted one would have."""


def save_checkpoint(folder: Path, step: int, trainee: Trainee, losses: LossSums) -> Path:
    """Write `step-<steps done>.pt` and drop older ones. A crash in the middle leaves the previous checkpoint whole."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    temporary = path.with_name(f"{path.name}{TEMPORARY}")
    torch.save(
        {
            "step": step,
            "student": trainee.student.state_dict(),
            "adaptors": trainee.adaptors.state_dict(),
            "balancing": trainee.balancing.state_dict(),
            "optimizer": trainee.optimizer.state_dict(),
            "losses": losses,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        },
        temporary,
    )
    temporary.replace(path)
    sync_folder(folder)
    for old in checkpoints(folder)[:-_KEEP]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*.pt") if _NAME.match(path.name)) if folder.exists() else []


def restore(path: Path, trainee: Trainee) -> tuple[int, LossSums]:
    """Load a checkpoint into the trainee and the random generators; returns the steps done and the losses not logged."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        trainee.student.load_state_dict(state["student"])
        trainee.adaptors.load_state_dict(state["adaptors"])
        trainee.balancing.load_state_dict(state["balancing"])
        trainee.optimizer.load_state_dict(state["optimizer"])
    except Exception as exc:  # torch raises many kinds for a damaged or foreign file
        raise TrainingError(
            f"checkpoint {path} cannot be used ({exc}): remove it to go on from the one before"
        ) from exc
    torch.set_rng_state(state["random"])
    if state["random_cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["random_cuda"])
    return int(state["step"]), state["losses"]
