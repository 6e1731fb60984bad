"""The command `radio-train`: train a student from a cache."""

import contextlib
import os
import shlex
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import click
from rich.console import RenderableType

from radio_cache import __version__
from radio_cache.terminal.help import HELP_SETTINGS, SectionedCommand
from radio_cache.terminal.options import device_option
from radio_cache.terminal.output import (
    INTERRUPTED,
    PATH_OR_URL,
    allow_module_option,
    console,
    plain_errors,
    print_line,
    printable,
    table,
)
from trainer.recipes.options import RecipeOptions, option_names, recipe_of_options, recipe_options

TERMINATED = 143
"""Exit code after SIGTERM or Ctrl-C with a checkpoint saved; schedulers requeue on it."""


@click.command(
    context_settings=HELP_SETTINGS,
    cls=SectionedCommand,
    sections={
        "Data and student": ("cache", "student", "teachers", "out"),
        "Recipe": option_names("Recipe"),
        "Initial weights": option_names("Initial weights"),
        "Running": ("device", "allow_partial", "allow_module", "wandb"),
    },
    examples=(
        "radio-train --cache cache.zarr --student e-radio-tiny --out run",
        "radio-train --cache cache.zarr --student vit-s-16 --image-size 224 --out run",
        "radio-train --cache cache.zarr --recipe am-radio --set seed=3 --out run",
        "torchrun --nproc-per-node 8 -m trainer.cli --cache cache.zarr --out run",
    ),
)
@click.version_option(__version__, prog_name="radio-train")
@click.option(
    "--cache",
    required=True,
    type=PATH_OR_URL,
    metavar="PATH_OR_URL",
    help="Cache made by `radio-cache build`: a folder or a URL.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Folder of the run to create. If it already holds this run, training resumes from the last checkpoint.",
)
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    metavar="NAME",
    help="Train on this teacher of the cache only. Repeatable. [default: all]",
)
@recipe_options
@click.option(
    "--wandb",
    metavar="PROJECT",
    help="Also log to this project of Weights & Biases; WANDB_MODE=offline keeps the log on this machine. "
    "[default: log to the folder of the run only]",
)
@click.option(
    "--allow-partial",
    is_flag=True,
    help="Train on an incomplete cache, with the images that have the features of every teacher.",
)
@allow_module_option
@device_option()
@plain_errors(on_interrupt="")
def main(
    cache: str | Path,
    out: Path,
    teachers: tuple[str, ...],
    allow_partial: bool,
    device: str,
    wandb: str | None,
    **options: Any,
) -> None:
    """Train a student on the cached features of teachers, with new random crops in each epoch. No teacher runs.

    The same command resumes a run that was stopped, and ends with the same weights as without the stop. Under torchrun, each
    batch is divided among all processes. The folder of the run holds student.safetensors, recipe.json, metrics.jsonl and
    TensorBoard events.
    """
    with _report_on_interrupt(out):
        # Imported at their use: torch takes seconds, which --help and a wrong option should not.
        from radio_cache.torch import pick_device
        from trainer.loop import train
        from trainer.train_config import TrainConfig

        device = _local_gpu(pick_device(device))
        recipe = recipe_of_options(RecipeOptions(**options), cache, teachers, device)
        config = TrainConfig(
            cache=cache,
            recipe=recipe,
            out=out,
            teachers=teachers,
            device=device,
            allow_partial=allow_partial,
            wandb=wandb,
        )
        report = train(config, on_message=print_line)
    # A scheduler requeues on this exit code, so that only a saved checkpoint may lead to it.
    if report.stopped:
        if _is_first_process():
            click.echo(
                f"stopped at step {report.steps} with a checkpoint saved. Resume with: {_resume_command()}", err=True
            )
        sys.exit(TERMINATED)
    if _is_first_process():
        losses = loss_table(out)
        if losses is not None:
            console().print(losses)
        summary = (
            f"{out} is finished: all its {report.steps} steps were done before, and nothing was done now. To train "
            "another student, choose another --out, or remove that folder."
            if report.was_finished
            else f"{report.steps} steps ({report.steps - report.steps_before} now) in {report.seconds:.0f} s."
        )
        run = shlex.quote(str(out))
        # Without classes, k-NN has nothing to count; the rank of summaries needs none.
        evaluation = "knn" if report.has_classes else "rank"
        click.echo(
            f"\n{summary} Student: {out}/student.safetensors"
            f"\nNext: radio-eval {evaluation} --run {run}\n      radio-export --run {run} --out student/"
            f"\n      tensorboard --logdir {run}"
        )


def _is_first_process() -> bool:
    """Return whether this process prints, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _resume_command() -> str:
    """Return the command line that resumes this run: the present one, under torchrun if torchrun started it."""
    if "RANK" not in os.environ:
        return shlex.join(["radio-train", *sys.argv[1:]])
    num_processes = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    return shlex.join(["torchrun", "--nproc-per-node", num_processes, "-m", "trainer.cli", *sys.argv[1:]])


def _local_gpu(device: str) -> str:
    """Return the device of this process: under torchrun, "cuda" becomes the GPU of its local rank."""
    # Without this, all processes of a machine would share its first GPU.
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local is not None else device


def loss_table(out: Path) -> RenderableType | None:
    """Return a table of each teacher's losses in the first and the last log line of a run; None without a log."""
    from trainer.monitoring.metrics import METRICS_FILE, read_lines

    # First and last measured value of each part: a step may train some of the teachers.
    lines = read_lines(out / METRICS_FILE)
    if not lines:
        return None
    rows = table("losses", "teacher", "summary, first", "last", "spatial, first", "last")
    for name in lines[0]["teachers"]:
        cells: list[float | None] = []
        for part in ("summary", "spatial"):
            values = [line["teachers"].get(name, {}).get(part) for line in lines]
            measured = [value for value in values if value is not None]
            cells += (measured[0], measured[-1]) if measured else (None, None)
        rows.add_row(printable(name), *("-" if value is None else f"{value:.3f}" for value in cells))
    return rows


@contextlib.contextmanager
def _report_on_interrupt(out: Path) -> Generator[None]:
    """Report what a run has saved if Ctrl-C arrives outside of the steps: while it loads, or writes the student."""
    try:
        yield
    except KeyboardInterrupt:
        if _is_first_process():
            click.echo(f"\nstopped. {_state_of_run(out)}", err=True)
        sys.exit(INTERRUPTED)


def _state_of_run(out: Path) -> str:
    """Return a sentence about where the same command would resume."""
    from trainer.run.checkpoint import checkpoints
    from trainer.run.folder import CHECKPOINTS, RUN_FILE

    try:
        saved = checkpoints(out / CHECKPOINTS)
    except OSError as exc:
        return f"{out / CHECKPOINTS} cannot be listed ({exc.strerror})."
    if saved:
        return f"{saved[-1].name} is complete: the same command resumes from it."
    if (out / RUN_FILE).exists():
        return "No checkpoint was saved yet: the same command starts again from the first step."
    return "Nothing was written yet."


if __name__ == "__main__":  # torchrun --nproc-per-node 8 -m trainer.cli ...
    main()
