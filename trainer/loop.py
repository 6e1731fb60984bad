"""Stage 2: train a student against the cached features. One trainer; recipes, losses and heads are what varies."""

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
    """What a run did. steps: done in all; steps_before: by earlier starts. stopped: early, by a signal.

    was_finished: it was already, and nothing was done. has_classes: whether its images have at least two classes.
    """

    steps: int
    steps_before: int
    seconds: float
    stopped: bool
    was_finished: bool = False
    has_classes: bool = False


def train(config: TrainConfig, say: Callable[[str], None] = lambda _: None) -> TrainReport:
    """Train, or go on with the run in `config.out`: killed at any step, the same call gives the same weights.

    SIGTERM and Ctrl-C save a checkpoint and return early. Under torchrun, all processes call this alike. Raises
    ConfigError or StoreError before anything is written, NonFiniteLossError naming teacher, step and images.
    """
    processes = Processes.joined(torch.device(config.device))
    say = say if processes.is_first else lambda _: None
    try:
        if config.wandb is not None and processes.is_first:
            refuse_missing_package()
        with explain_out_of_memory():
            run = TrainingRun(config, processes, say)
        with run.claim_folder():
            progress = restore_last(config.out / CHECKPOINTS, run.training_state, say)
            if progress.step == config.recipe.steps and holds_student(config.out):
                return TrainReport(
                    progress.step, progress.step, 0.0, stopped=False, was_finished=True, has_classes=run.has_classes
                )
            if progress.step:
                say(f"going on from step-{progress.step:08d}.pt")
                if not run.statistics.from_folder and run.statistics.by_teacher:
                    say(
                        "the run was begun by a version that did not keep what it normalised targets by: fitted anew, they may "
                        "differ from what it began with (docs/design/009-target-statistics.md)"
                    )
            width = max(80, min(110, shutil.get_terminal_size((110, 24)).columns))
            say(f"{summarise_recipe(config.recipe, width=width)}\n{run.headline()}")
            with explain_out_of_memory(), report_last_checkpoint(config.out / CHECKPOINTS):
                return run_steps(run, progress)
    finally:
        processes.leave()


def run_steps(run: TrainingRun, progress: Progress) -> TrainReport:
    """The steps that are left, with log lines and checkpoints, and what the user takes home at the end."""
    config, recipe, first = run.config, run.config.recipe, run.processes.is_first
    started, done = time.perf_counter(), progress.step
    step, stopped, watch = done, False, Evaluation(run)
    run.model.train()
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_stop_signal())
        log = stack.enter_context(_log(config, progress, run.teachers)) if first else None
        line = stack.enter_context(ProgressLine("training", recipe.steps, unit="steps", done=done)) if first else None
        loaded_batches = iter(stack.enter_context(run.loader(done)))
        while step < recipe.steps and not stopped:
            values, waits, images, stopped = run.step(step, loaded_batches, stop.is_set())
            step += 1
            if first:
                refuse_lost(config.out)
            last = stopped or step == recipe.steps
            # The first process looks at the student and saves it; where it is divided, nobody can alone.
            takes_part = first or run.training_state.is_divided
            measured = watch.measured(step, last) if takes_part else {}
            if log and line:
                log.add(values, waits, images)
                told = None
                if last or measured or step % recipe.log_every == 0:
                    told = log.write(step, run.lr_of(step - 1), measured)
                line.advance(1, told)
            is_best = "knn" in measured and (progress.best is None or measured["knn"] > progress.best)
            if is_best:
                progress = replace(progress, best=measured["knn"], best_error=measured["knn_error"])
            if takes_part and (last or is_best or step % recipe.checkpoint_every == 0):
                state = run.training_state.state(keep=first)
                if log:
                    save_checkpoint(
                        config.out / CHECKPOINTS,
                        state,
                        replace(progress, step=step, losses=log.sums),
                        keep=recipe.keep_checkpoints,
                        is_best=is_best,
                    )
        run.processes.wait_for_all()
    if not stopped and (first or run.training_state.is_divided):
        run.finish()
    return TrainReport(step, done, time.perf_counter() - started, stopped, has_classes=run.has_classes)


def _log(config: TrainConfig, progress: Progress, teachers: Sequence[str]) -> MetricsLog:
    also = None if config.wandb is None else WandbLog(config.wandb, config.out, config.recipe)
    return MetricsLog(config.out, progress.step, progress.losses or {}, teachers, also)


@contextlib.contextmanager
def _stop_signal() -> Generator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set, so that the step under way ends and a checkpoint is written."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals belong to the main thread; whoever runs us elsewhere stops us otherwise
        return

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        stop.set()

    before = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
