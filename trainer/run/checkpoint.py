"""Checkpoints: the state from which a run resumes exactly, written to a temporary file and renamed."""

import contextlib
import errno
import os
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from radio_cache.errors import NonFiniteLossError, StorageError, TrainingError
from radio_cache.storage.local import TEMPORARY, sync_folder
from radio_cache.torch.memory import is_out_of_memory
from trainer.distributed.fsdp import divided, is_sharded, whole
from trainer.model.ema import Ema
from trainer.monitoring.metrics import LossSums

BEST = "best.pt"
"""Name of the best checkpoint by k-NN."""

_NAME = re.compile(r"step-(\d{8})\.pt\Z")


@dataclass(frozen=True)
class TrainingState:
    """The modules and the optimiser that are trained and saved together."""

    student: nn.Module
    adaptors: nn.Module
    balancing: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None

    @property
    def is_divided(self) -> bool:
        """True if the weights are sharded among the processes, so that all of them take part in reading them."""
        return any(map(is_sharded, self.student.parameters()))

    def state_dict(self, *, keep: bool = True) -> dict[str, Any]:
        """Return the state in whole tensors. If the weights are sharded, all processes call this.

        Args:
            keep: whether this process needs the result; gathered tensors are dropped otherwise.
        """
        state: dict[str, Any] = {
            "student": self.student.state_dict(),
            "adaptors": self.adaptors.state_dict(),
            "balancing": self.balancing.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }
        return whole(state, keep=keep) if self.is_divided else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `state_dict`, on any number of processes."""
        present = self.student.state_dict()
        self.student.load_state_dict(
            {name: divided(value, present.get(name)) for name, value in state["student"].items()}
        )
        self.adaptors.load_state_dict(state["adaptors"])
        self.balancing.load_state_dict(state["balancing"])
        # Optimiser state is numbered by parameter; each moment is sharded as its parameter is.
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
    """The progress of a run at a checkpoint.

    Attributes:
        step: number of completed steps.
        losses: losses since the last log line.
        best: score of the best checkpoint so far; higher is better.
        best_error: standard error of that score.
    """

    step: int = 0
    losses: LossSums | None = None
    best: float | None = None
    best_error: float | None = None


def save_checkpoint(
    folder: Path, state: dict[str, Any], progress: Progress, *, keep: int, is_best: bool = False
) -> Path:
    """Write a checkpoint `step-<completed steps>.pt`, and delete all but the last `keep`. A crash leaves the others intact.

    Args:
        folder: folder of the checkpoints.
        state: result of `TrainingState.state_dict`.
        progress: progress of the run.
        keep: number of checkpoints to keep.
        is_best: whether to keep it as `best.pt`, too.

    Returns:
        The file of the checkpoint.

    Raises:
        TrainingError: the disk is full or fails.
        NonFiniteLossError: weights are not finite; nothing is written.
    """
    _refuse_non_finite(progress.step, state)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{progress.step:08d}.pt"
    temporary = path.with_name(f"{path.name}{TEMPORARY}")
    state = {
        "step": progress.step,
        "losses": progress.losses or {},
        "best": progress.best,
        "best_error": progress.best_error,
        "threads": torch.get_num_threads(),  # for a note on resuming with another number
        **state,
    }
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            # On the disk before the rename, or a power cut could leave an empty file under the final name.
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as exc:
        raise _not_written(folder, exc) from exc
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(folder)  # the rename itself, too
    if is_best:
        linked = folder / f"{BEST}{TEMPORARY}"
        linked.unlink(missing_ok=True)
        try:
            # A link needs no second copy on the disk, and stays when the step's own file is deleted.
            os.link(path, linked)
        except OSError:  # not all file systems have links
            shutil.copyfile(path, linked)
        linked.replace(folder / BEST)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def _refuse_non_finite(step: int, state: dict[str, Any]) -> None:
    """Raise NonFiniteLossError for weights that are not finite: the loss was computed before the update."""
    for part in ("student", "adaptors"):
        for name, value in state[part].items():
            if not torch.isfinite(value).all():
                raise NonFiniteLossError(
                    f"step {step}: its losses were finite, but weights '{name}' of the {part} no longer are, and are not saved. "
                    "The last checkpoint is whole; try a lower --lr"
                )


@contextlib.contextmanager
def report_last_checkpoint(folder: Path) -> Generator[None]:
    """Turn errors of the system into a TrainingError that names the checkpoint from which the run resumes.

    Args:
        folder: folder of the checkpoints.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # standard output was closed: click ends the command quietly
    except OSError as exc:
        raise _not_written(folder, exc) from exc
    except StorageError as exc:
        root = _system_error(exc)
        if root is None or root.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise  # an error of the cache, which names its own cure
        raise _not_written(folder, exc) from exc


def _not_written(folder: Path, exc: Exception) -> TrainingError:
    """Return the error for a failed write, recognising a full disk behind the errors that libraries make of it."""
    root = _system_error(exc)
    statistics = os.statvfs(next(path for path in (folder, *folder.parents) if path.exists()))
    free = statistics.f_bavail * statistics.f_frsize
    # torch reports a full disk without the system's error number: under 1 MB free counts as full.
    full = (root is not None and root.errno in (errno.ENOSPC, errno.EDQUOT)) or free < 1 << 20
    problem = f"the disk of {folder} is full ({free / 1e6:.1f} MB free)" if full else _first_line(exc)
    cure = "make room" if full else "cure that"
    # The message must not fail on the disk that it reports.
    last = list[Path]()
    with contextlib.suppress(OSError):
        last = checkpoints(folder)
    return TrainingError(
        f"{problem}. {last[-1].name} is whole: {cure}, and the same command goes on from it"
        if last
        else f"{problem}, and there is no checkpoint yet: {cure}, and start again"
    )


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first; none if there is no folder.

    Raises:
        OSError: the folder cannot be listed, which does not mean that it is empty.
    """
    try:
        # Temporary and damaged files have other names.
        with os.scandir(folder) as entries:
            return sorted(folder / entry.name for entry in entries if _NAME.match(entry.name))
    except FileNotFoundError:
        return []


def restore_last(folder: Path, training_state: TrainingState, on_message: Callable[[str], None]) -> Progress:
    """Load the last intact checkpoint, and rename damaged ones after it to `*.damaged`.

    Args:
        folder: folder of the checkpoints.
        training_state: modules and optimiser to load into.
        on_message: receives notes about damaged checkpoints, and about another number of threads.

    Returns:
        The progress of the checkpoint, or that of a new run if there is none.

    Raises:
        TrainingError: all checkpoints are damaged; one is of another student; or one cannot be read at present, or does not fit
            into memory. Nothing is renamed then.
    """
    damaged: dict[Path, str] = {}
    try:
        saved = checkpoints(folder)
    except OSError as exc:
        raise TrainingError(
            f"{folder} cannot be listed ({exc.strerror}), so that the last checkpoint is unknown: cure that. Nothing was "
            "changed"
        ) from exc
    for path in reversed(saved):
        try:
            state = load_checkpoint(path)
        except DamagedCheckpointError as exc:
            damaged[path] = str(exc)
            continue
        progress = _restored(path, state, training_state)
        _note_other_threads(state.get("threads"), training_state, on_message)
        # Renamed only now: if no checkpoint loads, the folder stays as it was.
        for file, reason in damaged.items():
            on_message(f"{file.name} is damaged ({reason}) and set aside; the one before it, {path.name}, is used")
            file.replace(file.with_name(f"{file.name}.damaged"))
        return progress
    if damaged:
        listed = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
        raise TrainingError(
            f"none of the checkpoints in {folder} can be read, they are damaged ({listed}): restore them from a copy, or train "
            "again with another --out"
        )
    return Progress()


def _note_other_threads(recorded: Any, training_state: TrainingState, on_message: Callable[[str], None]) -> None:
    """Note that the number of threads has changed: sums then round differently, and the weights with them."""
    on_cpu = next((p.device.type for p in training_state.student.parameters()), "cpu") == "cpu"
    num_threads = torch.get_num_threads()
    if on_cpu and isinstance(recorded, int) and recorded != num_threads:
        on_message(
            f"the run was computed by {recorded} threads so far and is by {num_threads} now: its weights will differ, in "
            f"rounding, from those of a run that was never stopped. OMP_NUM_THREADS={recorded} goes on as before"
        )


class DamagedCheckpointError(TrainingError):
    """A checkpoint's bytes are incomplete or changed; the message names the evidence."""


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint to the CPU, after checking its checksums, which torch does not.

    Raises:
        DamagedCheckpointError: the bytes of the file are damaged.
        TrainingError: the file cannot be read for any other reason: permissions, a disk or a network that does not answer, too
            little memory, another PyTorch.
    """
    try:
        damage = _damage(path)
        if damage is None:
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:  # torch raises many kinds for a file that it cannot use
        raise TrainingError(f"{_why_unreadable(path, exc)}. Nothing was changed") from exc
    raise DamagedCheckpointError(damage)


def _damage(path: Path) -> str | None:
    """Return evidence that a checkpoint is damaged, or None. Raises OSError or MemoryError if it cannot be checked."""
    try:
        # torch.save writes a zip archive, whose members have checksums.
        with zipfile.ZipFile(path) as file:
            damaged_member = file.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, struct.error, ValueError) as exc:
        return str(exc).rstrip(".") or "it ends too early"
    return None if damaged_member is None else f"the checksum of {damaged_member} is wrong"


def _why_unreadable(path: Path, exc: Exception) -> str:
    """Return why an apparently intact checkpoint cannot be loaded, and the cure."""
    system = _system_error(exc)
    if is_out_of_memory(exc) or (system is not None and system.errno == errno.ENOMEM):
        size = f"{path.stat().st_size / 1e9:.2f} GB" if path.exists() else "its size"
        return (
            f"checkpoint {path} ({size}) does not fit into memory ({_first_line(exc)}): free some, or use a machine with more; "
            "the same command goes on from it"
        )
    if system is not None:
        return (
            f"checkpoint {path} cannot be read at present ({system.strerror or system}): cure that, and the same command goes on "
            "from it; to go on from the one before, move it elsewhere"
        )
    return (
        f"checkpoint {path} is whole, and this PyTorch ({torch.__version__}) cannot load it ({_first_line(exc)}): use the "
        "version that wrote it"
    )


def _first_line(exc: BaseException) -> str:
    return next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)[:200]


def _system_error(exc: BaseException | None) -> OSError | None:
    """Return the system's error that caused another one, or None."""
    # Libraries chain the system's error as a cause, or raise while handling it.
    while exc is not None and not isinstance(exc, OSError):
        exc = exc.__cause__ or exc.__context__
    return exc


def _restored(path: Path, state: dict[str, Any], training_state: TrainingState) -> Progress:
    try:
        training_state.load_state_dict(state)
        return Progress(int(state["step"]), state["losses"], state["best"], state.get("best_error"))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, MemoryError) as exc:
        if is_out_of_memory(exc):
            raise TrainingError(f"{_why_unreadable(path, exc)}. Nothing was changed") from exc
        raise TrainingError(
            f"checkpoint {path} is not one of this student and this radio-cache ({_first_line(exc)}): choose "
            "another --out, or go on with the version that wrote it"
        ) from exc
