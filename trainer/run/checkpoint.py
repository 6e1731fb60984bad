"""Checkpoints: everything a run needs to go on exactly, written aside and renamed; the last few are kept."""

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

_NAME = re.compile(r"step-(\d{8})\.pt\Z")


@dataclass(frozen=True)
class TrainingState:
    """What is trained and saved together."""

    student: nn.Module
    adaptors: nn.Module
    balancing: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None

    @property
    def is_divided(self) -> bool:
        """Return whether its weights lie divided among the processes, so that all of them take part in looking at it."""
        return any(map(is_sharded, self.student.parameters()))

    def state(self, *, keep: bool = True) -> dict[str, Any]:
        """What is saved, in whole tensors. Where it is divided, all processes call this; keep: this one wants it."""
        state: dict[str, Any] = {
            "student": self.student.state_dict(),
            "adaptors": self.adaptors.state_dict(),
            "balancing": self.balancing.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }
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
    """Where a run stands. losses: not logged yet.

    best: score of the best checkpoint so far, higher is better; best_error: its standard error.
    """

    step: int = 0
    losses: LossSums | None = None
    best: float | None = None
    best_error: float | None = None


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
    state = {
        "step": progress.step,
        "losses": progress.losses or {},
        "best": progress.best,
        "best_error": progress.best_error,
        "threads": torch.get_num_threads(),
        **state,
    }
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as exc:
        raise _not_written(folder, exc) from exc
    finally:
        temporary.unlink(missing_ok=True)
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
def report_last_checkpoint(folder: Path) -> Generator[None]:
    """Turn what the system refuses a run into a TrainingError that says from where it goes on. folder: of checkpoints."""
    try:
        yield
    except BrokenPipeError:
        raise  # nobody reads what is said: click ends the command quietly
    except OSError as exc:
        raise _not_written(folder, exc) from exc
    except StorageError as exc:
        root = _system_error(exc)
        if root is None or root.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise  # of the cache, which says its own cure
        raise _not_written(folder, exc) from exc


def _not_written(folder: Path, exc: Exception) -> TrainingError:
    """Libraries turn a full disk into errors of their own; the system's word for it is at the root, if it is there at all."""
    root = _system_error(exc)
    statistics = os.statvfs(next(place for place in (folder, *folder.parents) if place.exists()))
    free = statistics.f_bavail * statistics.f_frsize
    full = (root is not None and root.errno in (errno.ENOSPC, errno.EDQUOT)) or free < 1 << 20
    what = f"the disk of {folder} is full ({free / 1e6:.1f} MB free)" if full else _first_line(exc)
    cure = "make room" if full else "cure that"
    last = list[Path]()
    with contextlib.suppress(OSError):
        last = checkpoints(folder)
    return TrainingError(
        f"{what}. {last[-1].name} is whole: {cure}, and the same command goes on from it"
        if last
        else f"{what}, and there is no checkpoint yet: {cure}, and start again"
    )


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first; none where there is no folder.

    Raises OSError for a folder that cannot be listed: it is not an empty one.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(folder / entry.name for entry in entries if _NAME.match(entry.name))
    except FileNotFoundError:
        return []


def restore_last(folder: Path, training_state: TrainingState, say: Callable[[str], None]) -> Progress:
    """Load the last checkpoint that is whole; says which were damaged and sets them aside.

    Raises TrainingError where there are checkpoints and all are damaged, where one is of another student, or where one
    cannot be read just now or does not fit into memory; then nothing is renamed.
    """
    damaged: dict[Path, str] = {}
    try:
        saved = checkpoints(folder)
    except OSError as exc:
        raise TrainingError(
            f"{folder} cannot be listed ({exc.strerror}), so that nobody knows where the run stands: cure that. Nothing was "
            "changed"
        ) from exc
    for path in reversed(saved):
        try:
            state = load_checkpoint(path)
        except DamagedCheckpointError as exc:
            damaged[path] = str(exc)
            continue
        progress = _restored(path, state, training_state)
        _tell_other_threads(state.get("threads"), training_state, say)
        for file, reason in damaged.items():
            say(f"{file.name} is damaged ({reason}) and set aside; the one before it, {path.name}, is used")
            file.replace(file.with_name(f"{file.name}.damaged"))
        return progress
    if damaged:
        listed = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
        raise TrainingError(
            f"none of the checkpoints in {folder} can be read, they are damaged ({listed}): restore them from a copy, or train "
            "again with another --out"
        )
    return Progress()


def _tell_other_threads(recorded: Any, training_state: TrainingState, say: Callable[[str], None]) -> None:
    """Sums over another number of threads round otherwise, so that the weights are not those of a run that was never stopped."""
    on_cpu = next((p.device.type for p in training_state.student.parameters()), "cpu") == "cpu"
    now = torch.get_num_threads()
    if on_cpu and isinstance(recorded, int) and recorded != now:
        say(
            f"the run was computed by {recorded} threads so far and is by {now} now: its weights will differ, in "
            f"rounding, from those of a run that was never stopped. OMP_NUM_THREADS={recorded} goes on as before"
        )


class DamagedCheckpointError(TrainingError):
    """The bytes of a checkpoint show that it is not whole; the message says what shows it."""


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint to the CPU, after checking its checksums, which torch does not.

    Raises DamagedCheckpointError only for what the bytes of the file show. Anything else that is in the way (permissions, a
    disk or a network that does not answer, too little memory, another PyTorch) is a TrainingError that says so.
    """
    try:
        damage = _damage(path)
        if damage is None:
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:  # torch raises many kinds for a file that it cannot use
        raise TrainingError(f"{_in_the_way(path, exc)}. Nothing was changed") from exc
    raise DamagedCheckpointError(damage)


def _damage(path: Path) -> str | None:
    """Return what shows that a checkpoint is not whole, or None. Raises OSError or MemoryError where it cannot be checked."""
    try:
        with zipfile.ZipFile(path) as file:
            torn = file.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, struct.error, ValueError) as exc:
        return str(exc).rstrip(".") or "it ends too early"
    return None if torn is None else f"the checksum of {torn} is wrong"


def _in_the_way(path: Path, exc: Exception) -> str:
    """Say why a checkpoint that is not known to be damaged cannot be used now, and how it can."""
    system = _system_error(exc)
    if is_out_of_memory(exc) or (system is not None and system.errno == errno.ENOMEM):
        size = f"{path.stat().st_size / 1e9:.2f} GB" if path.exists() else "its size"
        return (
            f"checkpoint {path} ({size}) does not fit into memory ({_first_line(exc)}): free some, or use a machine with more; "
            "the same command goes on from it"
        )
    if system is not None:
        return (
            f"checkpoint {path} cannot be read just now ({system.strerror or system}): cure that, and the same command goes on "
            "from it; to go on from the one before, move it elsewhere"
        )
    return (
        f"checkpoint {path} is whole, and this PyTorch ({torch.__version__}) cannot load it ({_first_line(exc)}): use the "
        "version that wrote it"
    )


def _first_line(exc: BaseException) -> str:
    return next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)[:200]


def _system_error(exc: BaseException | None) -> OSError | None:
    """The system's own error at the root of a library's."""
    while exc is not None and not isinstance(exc, OSError):
        exc = exc.__cause__ or exc.__context__
    return exc


def _restored(path: Path, state: dict[str, Any], training_state: TrainingState) -> Progress:
    try:
        training_state.load(state)
        return Progress(int(state["step"]), state["losses"], state["best"], state.get("best_error"))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, MemoryError) as exc:
        if is_out_of_memory(exc):
            raise TrainingError(f"{_in_the_way(path, exc)}. Nothing was changed") from exc
        raise TrainingError(
            f"checkpoint {path} is not one of this student and this radio-cache ({_first_line(exc)}): choose "
            "another --out, or go on with the version that wrote it"
        ) from exc
