"""Checkpoints: everything a run needs to go on exactly, written aside and renamed; the last few are kept."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from radio_cache.errors import NonFiniteLossError, TrainingError
from radio_cache.local_storage import TEMPORARY, sync_folder
from trainer.ema import Ema
from trainer.metrics import LossSums
from trainer.sharded import divided, is_sharded, whole

BEST = "best.pt"

_NAME = re.compile(r"step-(\d{8})\.pt\Z")


@dataclass(frozen=True)
class Trainee:
    """What is trained and saved together."""

    student: nn.Module
    adaptors: nn.Module
    balancing: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None

    @property
    def is_divided(self) -> bool:
        """Whether its weights lie divided among the processes, so that all of them take part in looking at it."""
        return any(map(is_sharded, self.student.parameters()))

    def state(self, *, keep: bool = True) -> dict[str, Any]:
        """What is saved, in whole tensors. Where it is divided, all processes call this; keep: this one wants it."""
        state: dict[str, Any] = {
            "student": self.student.state_dict(), "adaptors": self.adaptors.state_dict(),
            "balancing": self.balancing.state_dict(), "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }  # fmt: skip
        return whole(state, keep=keep) if self.is_divided else state

    def load(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave, on whatever number of processes."""
        mine = self.student.state_dict()
        self.student.load_state_dict({name: divided(value, mine.get(name)) for name, value in state["student"].items()})
        self.adaptors.load_state_dict(state["adaptors"])
        self.balancing.load_state_dict(state["balancing"])
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            number: {name: divided(value, parameters[number]) for name, value in values.items()}
            for number, values in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({**state["optimizer"], "state": moments})
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


@dataclass(frozen=True)
class Progress:
    """Where a run stands. losses: not logged yet. best: score of the best checkpoint so far; higher is better."""

    step: int = 0
    losses: LossSums | None = None
    best: float | None = None


def save_checkpoint(
    folder: Path, state: dict[str, Any], progress: Progress, *, keep: int, is_best: bool = False
) -> Path:
    """Write a trainee's state as `step-<steps done>.pt` and drop all but the last `keep`. A crash leaves the others whole.

    is_best: it is also kept as `best.pt`. Raises TrainingError for a disk that is full, NonFiniteLossError for weights that
    left their bounds in the step just done; the last checkpoint is still whole then.
    """
    _refuse_non_finite(progress.step, state)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{progress.step:08d}.pt"
    temporary = path.with_name(f"{path.name}{TEMPORARY}")
    state = {"step": progress.step, "losses": progress.losses or {}, "best": progress.best, **state}
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as exc:
        temporary.unlink(missing_ok=True)
        raise _not_written(folder, exc) from exc
    temporary.replace(path)
    sync_folder(folder)
    if is_best:
        linked = folder / f"{BEST}{TEMPORARY}"
        linked.unlink(missing_ok=True)
        try:
            os.link(path, linked)
        except OSError:  # not all file systems have links
            shutil.copyfile(path, linked)
        linked.replace(folder / BEST)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def _refuse_non_finite(step: int, state: dict[str, Any]) -> None:
    """The loss before a step says nothing of the weights behind it."""
    for part in ("student", "adaptors"):
        for name, value in state[part].items():
            if not torch.isfinite(value).all():
                raise NonFiniteLossError(
                    f"step {step}: its losses were finite, but weights '{name}' of the {part} no longer are, and are not saved. "
                    "The last checkpoint is whole; try a lower --lr"
                )


@contextlib.contextmanager
def telling_what_is_whole(folder: Path) -> Generator[None]:
    """Turn what the system refuses a run into a TrainingError that says from where it goes on. folder: of checkpoints."""
    try:
        yield
    except BrokenPipeError:
        raise  # nobody reads what is said: click ends the command quietly
    except OSError as exc:
        raise _not_written(folder, exc) from exc


def _not_written(folder: Path, exc: OSError | RuntimeError) -> TrainingError:
    """torch turns a full disk into a RuntimeError of its own; the system's word for it is at its root."""
    root: BaseException | None = exc
    while root is not None and not isinstance(root, OSError):
        root = root.__cause__ or root.__context__
    statistics = os.statvfs(next(place for place in (folder, *folder.parents) if place.exists()))
    free = statistics.f_bavail * statistics.f_frsize
    full = (isinstance(root, OSError) and root.errno in (errno.ENOSPC, errno.EDQUOT)) or free < 1 << 20
    what = f"the disk of {folder} is full ({free / 1e6:.1f} MB free)" if full else str(exc)
    cure = "make room" if full else "cure that"
    last = checkpoints(folder)
    return TrainingError(
        f"{what}. {last[-1].name} is whole: {cure}, and the same command goes on from it"
        if last
        else f"{what}, and there is no checkpoint yet: {cure}, and start again"
    )


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*.pt") if _NAME.match(path.name)) if folder.exists() else []


def restore_last(folder: Path, trainee: Trainee, say: Callable[[str], None]) -> Progress:
    """Load the last checkpoint that can be read; says which were damaged.

    Raises TrainingError where there are checkpoints and none can be read, or where one is of another student.
    """
    damaged: list[Path] = []
    for path in reversed(checkpoints(folder)):
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # torch raises many kinds for a damaged or foreign file, and none says more than that it is one
            damaged.append(path)
            continue
        progress = _restored(path, state, trainee)
        for file in damaged:
            say(f"{file.name} is damaged and set aside; the one before it, {path.name}, is used")
            file.replace(file.with_name(f"{file.name}.damaged"))
        return progress
    if damaged:
        raise TrainingError(
            f"none of the checkpoints in {folder} can be read, they are damaged ({', '.join(path.name for path in damaged)}): "
            "restore them from a copy, or remove the run and start again"
        )
    return Progress()


def _restored(path: Path, state: dict[str, Any], trainee: Trainee) -> Progress:
    try:
        trainee.load(state)
        return Progress(int(state["step"]), state["losses"], state["best"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as exc:
        raise TrainingError(
            f"checkpoint {path} is not one of this student and this radio-cache ({str(exc).splitlines()[0]:.200}): choose "
            "another --out, or go on with the version that wrote it"
        ) from exc
