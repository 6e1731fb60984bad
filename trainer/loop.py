"""The training loop: steps, log lines, evaluations and checkpoints of a run; SIGTERM stops it after a checkpoint."""

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from types import FrameType

import torch

from radio_cache.terminal.output import ProgressLine
from trainer.distributed.processes import Processes
from trainer.model.files import holds_student
from trainer.monitoring.metrics import MetricsLog
from trainer.monitoring.wandb_log import WandbLog, refuse_missing_package
from trainer.recipes.summary import summarise_recipe
from trainer.run.checkpoint import Progress, report_last_checkpoint, restore_last, save_checkpoint
from trainer.run.evaluation import Evaluation
from trainer.run.folder import CHECKPOINTS, refuse_lost
from trainer.run.memory import explain_out_of_memory
from trainer.run.step import TrainingRun
from trainer.train_config import TrainConfig


@dataclass(frozen=True)
class TrainReport:
    """The result of `train`.

    Attributes:
        steps: number of completed steps.
        steps_before: number of steps that earlier starts of the run completed.
        seconds: duration of this start's steps.
        stopped: whether a signal stopped the run early.
        was_finished: whether the run was finished before, so that nothing was done.
        has_classes: whether the training images have at least two classes.
    """

    steps: int
    steps_before: int
    seconds: float
    stopped: bool
    was_finished: bool = False
    has_classes: bool = False


def train(config: TrainConfig, on_message: Callable[[str], None] = lambda _: None) -> TrainReport:
    """Train a student, or resume the run in `config.out`. A run killed at any step ends with the same weights.

    SIGTERM and Ctrl-C save a checkpoint and return early. Under torchrun, every process makes the same call.

    Args:
        config: configuration of the run.
        on_message: receives notes for the user.

    Raises:
        ConfigError: the configuration does not fit the cache, the student or the run's folder; nothing is written.
        StoreError: the cache cannot be used; nothing is written.
        TrainingError: memory, the disk, or an image fails.
        NonFiniteLossError: a loss is not finite; the message names teacher, step and images.
    """
    processes = Processes.join(torch.device(config.device))
    # All processes reach the same decisions; one note of each is enough.
    on_message = on_message if processes.is_first else lambda _: None
    try:
        if config.wandb is not None and processes.is_first:
            refuse_missing_package()  # before a run's folder is made
        with explain_out_of_memory():
            run = TrainingRun(config, processes, on_message)
        with run.claim_folder():
            # Every process reads the checkpoint itself: nothing need be sent.
            progress = restore_last(config.out / CHECKPOINTS, run.training_state, on_message)
            if progress.step == config.recipe.steps and holds_student(config.out):
                return TrainReport(
                    progress.step, progress.step, 0.0, stopped=False, was_finished=True, has_classes=run.has_classes
                )
            if progress.step:
                on_message(f"going on from step-{progress.step:08d}.pt")
                if not run.statistics.from_folder and run.statistics.by_teacher:
                    on_message(
                        "the run was begun by a version that did not save its target statistics: they are computed again, and "
                        "may differ from the first ones (docs/design/009-target-statistics.md)"
                    )
            # Without a terminal, such as in a log file, 110 columns.
            width = max(80, min(110, shutil.get_terminal_size((110, 24)).columns))
            on_message(f"{summarise_recipe(config.recipe, width=width)}\n{run.headline()}")
            with explain_out_of_memory(), report_last_checkpoint(config.out / CHECKPOINTS):
                return run_steps(run, progress)
    finally:
        processes.leave()


def run_steps(run: TrainingRun, progress: Progress) -> TrainReport:
    """Make the remaining steps with log lines, evaluations and checkpoints, and save the finished student."""
    config, recipe, first = run.config, run.config.recipe, run.processes.is_first
    started, first_step = time.perf_counter(), progress.step
    step, stopped, evaluation = first_step, False, Evaluation(run)
    run.model.train()
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_stop_signal())
        log = stack.enter_context(_log(config, progress, run.teachers)) if first else None
        line = (
            stack.enter_context(ProgressLine("training", recipe.steps, unit="steps", done=first_step))
            if first
            else None
        )
        loaded_batches = iter(stack.enter_context(run.loader(first_step)))
        while step < recipe.steps and not stopped:
            losses, waits, num_images, stopped = run.step(step, loaded_batches, stop.is_set())
            step += 1  # completed steps from here on
            if first:
                # Checked every step: writing on would make half of a run's folder anew.
                refuse_lost(config.out)
            last = stopped or step == recipe.steps
            # The first process evaluates and saves the student. If it is sharded, all processes have to take part.
            takes_part = first or run.training_state.is_divided
            metrics = evaluation.metrics_after(step, last) if takes_part else {}
            if log and line:
                log.add(losses, waits, num_images)
                note = None
                if last or metrics or step % recipe.log_every == 0:
                    note = log.write(step, run.lr_of(step - 1), metrics)
                line.advance(1, note)
            is_best = "knn" in metrics and (progress.best is None or metrics["knn"] > progress.best)
            if is_best:
                progress = replace(progress, best=metrics["knn"], best_error=metrics["knn_error"])
            if takes_part and (last or is_best or step % recipe.checkpoint_every == 0):
                state = run.training_state.state_dict(keep=first)
                if log:
                    # Losses since the last line go along, so that a resumed run logs the same means.
                    save_checkpoint(
                        config.out / CHECKPOINTS,
                        state,
                        replace(progress, step=step, losses=log.sums),
                        keep=recipe.keep_checkpoints,
                        is_best=is_best,
                    )
        # The first process may still be writing.
        run.processes.wait_for_all()
    if not stopped and (first or run.training_state.is_divided):
        run.finish()
    return TrainReport(step, first_step, time.perf_counter() - started, stopped, has_classes=run.has_classes)


def _log(config: TrainConfig, progress: Progress, teachers: Sequence[str]) -> MetricsLog:
    second = None if config.wandb is None else WandbLog(config.wandb, config.out, config.recipe)
    return MetricsLog(config.out, progress.step, progress.losses or {}, teachers, second)


@contextlib.contextmanager
def _stop_signal() -> Generator[threading.Event]:
    """Yield an event that SIGTERM and Ctrl-C set, so that the current step ends and a checkpoint is written."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread can handle signals
        return

    def request_stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        stop.set()

    before = {number: signal.signal(number, request_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
