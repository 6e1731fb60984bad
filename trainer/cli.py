"""`radio-train`: a student from a cache."""

import contextlib
import os
import shlex
import sys
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import click
from rich.console import RenderableType

from radio_cache import __version__
from radio_cache.errors import ConfigError
from radio_cache.reader import Cache
from radio_cache.terminal.help import HELP_SETTINGS, SectionedCommand
from radio_cache.terminal.output import (
    INTERRUPTED,
    PLACE,
    allow_module_option,
    console,
    plain_errors,
    printable,
    say,
    table,
)

if TYPE_CHECKING:
    from trainer.model.student import StudentConfig
    from trainer.recipes.recipe import Recipe

TERMINATED = 143
"""Exit code after SIGTERM or Ctrl-C with a checkpoint saved; schedulers requeue on it."""


def _help_on_names(context: click.Context, option: click.Parameter, name: str | None) -> str | None:
    """`--student help` and `--recipe help`, before anything else is asked for."""
    if name == "help":
        from trainer.recipes.help import recipe_tables, student_tables

        for part in student_tables() if option.name == "student" else recipe_tables():
            console().print(part, soft_wrap=isinstance(part, str))
        context.exit()
    return name


@click.command(
    context_settings=HELP_SETTINGS,
    cls=SectionedCommand,
    sections={
        "What is trained, and from what": ("cache", "student", "teachers", "out"),
        "Recipe": ("recipe", "steps", "batch_size", "image_size", "centre_share", "holdout", "lr", "seed", "settings"),
        "Where the student starts": ("init", "pretrained"),
        "Where it runs": ("device", "allow_partial", "allow_module", "wandb"),
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
    "--cache", required=True, type=PLACE, metavar="CACHE.zarr", help="Made by `radio-cache build`: a folder, or a URL."
)
@click.option(
    "--student",
    metavar="NAME",
    is_eager=True,
    callback=_help_on_names,
    help="e-radio-tiny, vit-s-16, timm:resnet18 ...; `--student help` lists them. [default: the recipe's]",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Folder of the run; an interrupted run goes on.",
)
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    metavar="NAME",
    help="Learn from this cached teacher only. Repeatable. [default: all]",
)
@click.option(
    "--recipe",
    metavar="NAME",
    is_eager=True,
    callback=_help_on_names,
    help="quick, am-radio, phi-s, radio-v25 ..., or a run's recipe.json; `--recipe help` lists them. [default: quick, with "
    "size, steps and rate that suit the cache and the student]",
)
@click.option("--steps", type=int, metavar="N", help="Optimiser steps of all stages. [default: the recipe's]")
@click.option("--batch-size", type=int, metavar="N", help="Images in a step. [default: the recipe's]")
@click.option(
    "--image-size", type=int, metavar="PX", help="Side of the crops the student sees. [default: the recipe's]"
)
@click.option(
    "--centre-share",
    type=float,
    metavar="SHARE",
    help="Share of an image's shorter side that the finished student is shown, centred, where its teachers see a centre crop. "
    "[default: the teachers' own, the least of them]",
)
@click.option(
    "--holdout",
    type=float,
    metavar="SHARE",
    help="Share of the images to hold out of training, such as 0.1; evaluations use these. Chosen by the digests of the files. "
    "[default: none]",
)
@click.option("--lr", type=float, metavar="RATE", help="Peak learning rate. [default: the recipe's]")
@click.option("--seed", type=int, metavar="N", help="Of weights, order and crops. [default: the recipe's]")
@click.option(
    "--init",
    type=click.Path(path_type=Path),
    metavar="RUN_OR_EXPORT",
    help="Start with the weights of this finished student, which also says what network it is. Heads start anew.",
)
@click.option(
    "--pretrained",
    is_flag=True,
    help="Start a student of timm with timm's own weights, which are fetched from the Hugging Face Hub and kept.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any other setting of the recipe, such as crop_area=0.5,1 or stages.1.groups.0.image_px=432. Repeatable.",
)
@click.option(
    "--wandb",
    metavar="PROJECT",
    help="Tell a project of Weights & Biases what TensorBoard is told; WANDB_MODE=offline keeps it here. [default: nobody]",
)
@click.option(
    "--allow-partial", is_flag=True, help="Train on the images that are there, of a cache that is not finished."
)
@allow_module_option
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.",
)
@plain_errors(on_interrupt="")
def main(
    cache: str | Path,
    out: Path,
    teachers: tuple[str, ...],
    allow_partial: bool,
    device: str,
    wandb: str | None,
    **asked: Unpack["RecipeFlags"],
) -> None:
    """Train a student on the cached features of its teachers, with fresh random crops. No teacher runs.

    Stopped at any moment, the same command goes on where the last checkpoint was, and gives the same weights as a run
    that was never stopped. Started by torchrun, all processes share every batch. The run's folder holds
    student.safetensors, recipe.json, metrics.jsonl and TensorBoard events.
    """
    with _saying_where_it_stands(out):
        from radio_cache.torch import pick_device
        from trainer.loop import train
        from trainer.train_config import TrainConfig

        device = _own_gpu(pick_device(device))
        recipe = _recipe(cache, teachers, device, asked)
        config = TrainConfig(
            cache=cache,
            recipe=recipe,
            out=out,
            teachers=teachers,
            device=device,
            allow_partial=allow_partial,
            wandb=wandb,
        )
        report = train(config, say=say)
    if report.stopped:
        if _is_first():
            click.echo(
                f"stopped at step {report.steps} with a checkpoint saved. Go on with: {_this_command()}", err=True
            )
        sys.exit(TERMINATED)
    if _is_first():
        losses = loss_table(out)
        if losses is not None:
            console().print(losses)
        done = (
            f"{out} is finished: all its {report.steps} steps were done before, and nothing was done now. To train "
            "another student, choose another --out, or remove that folder."
            if report.was_finished
            else f"{report.steps} steps ({report.steps - report.steps_before} now) in {report.seconds:.0f} s."
        )
        run = shlex.quote(str(out))
        # Without classes, k-NN has nothing to count; the rank of summaries needs none.
        evaluation = "knn" if report.has_classes else "rank"
        click.echo(
            f"\n{done} Student: {out}/student.safetensors"
            f"\nNext: radio-eval {evaluation} --run {run}\n      radio-export --run {run} --out student/"
            f"\n      tensorboard --logdir {run}"
        )


class RecipeFlags(TypedDict):
    """What the command line says of the recipe; None for nothing."""

    student: str | None
    recipe: str | None
    steps: int | None
    batch_size: int | None
    image_size: int | None
    centre_share: float | None
    holdout: float | None
    lr: float | None
    seed: int | None
    init: Path | None
    pretrained: bool
    settings: tuple[str, ...]


def _recipe(cache: str | Path, teachers: tuple[str, ...], device: str, asked: "RecipeFlags") -> "Recipe":
    from trainer.model.student import STARTING_SETTINGS
    from trainer.recipes.auto import auto_recipe
    from trainer.recipes.overrides import apply_overrides
    from trainer.recipes.presets import find_recipe, quick
    from trainer.recipes.recipe import override_stages
    from trainer.students import is_of_timm

    pairs = [text.partition("=") for text in asked["settings"]]
    for key, equals, _ in pairs:
        if not equals:
            raise ConfigError(f"--set {key}: write it as KEY=VALUE")
    student, start = asked["student"], None
    if asked["init"] is not None:
        start = _start(asked["init"], pretrained=asked["pretrained"])
        student = student or start.student
    if asked["recipe"] is None:
        recipe = auto_recipe(
            quick(), Cache(cache), teachers, student, device, steps=asked["steps"], batch_images=asked["batch_size"]
        )
    else:
        recipe = find_recipe(asked["recipe"])
        if student is not None and student != recipe.student:
            not_from_paper = tuple(path for path in recipe.not_from_paper if not path.startswith("student_overrides."))
            recipe = replace(
                recipe, student=student, student_overrides={}, not_from_paper=not_from_paper
            )  # settings of another network
    recipe = override_stages(
        recipe, steps=asked["steps"], batch_images=asked["batch_size"], image_px=asked["image_size"], lr=asked["lr"]
    )
    for name in ("seed", "centre_share", "holdout"):
        if asked[name] is not None:
            recipe = replace(recipe, **{name: asked[name]})
    if start is not None and asked["init"] is not None:
        if recipe.student == start.student:
            settings = {key: value for key, value in start.overrides.items() if key not in STARTING_SETTINGS}
            recipe = replace(recipe, student_overrides={**settings, **recipe.student_overrides})
        recipe = replace(recipe, init=str(asked["init"].absolute()))
    if asked["pretrained"]:
        if not is_of_timm(recipe.student):
            raise ConfigError(
                f"--pretrained: student '{recipe.student}' is no model of timm, and has no weights of its own. A ViT starts from "
                "one of timm with --set student_overrides.init_from=MODEL, any student from a finished one with --init"
            )
        recipe = replace(recipe, student_overrides={**recipe.student_overrides, "pretrained": True})
    return apply_overrides(recipe, {key: value for key, _, value in pairs})


def _start(folder: Path, *, pretrained: bool) -> "StudentConfig":
    """What the finished student of --init is."""
    from trainer.model.files import holds_student, read_config

    if pretrained:
        raise ConfigError("--init and --pretrained exclude each other: a student starts with one set of weights")
    if not holds_student(folder):
        raise ConfigError(
            f"--init {folder} holds no finished student: give the folder of a finished run, or of radio-export"
        )
    return read_config(folder)[0]


def _is_first() -> bool:
    """Return whether this process speaks, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _this_command() -> str:
    """The command line that goes on with this run, as it was given, by torchrun where that started it."""
    if "RANK" not in os.environ:
        return shlex.join(["radio-train", *sys.argv[1:]])
    processes = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    return shlex.join(["torchrun", "--nproc-per-node", processes, "-m", "trainer.cli", *sys.argv[1:]])


def _own_gpu(device: str) -> str:
    """Each process of torchrun takes the GPU of its number."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local is not None else device


def loss_table(out: Path) -> RenderableType | None:
    """Losses per teacher at the first and at the last log line; None where the log was lost."""
    from trainer.monitoring.metrics import METRICS_FILE, read_lines

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
def _saying_where_it_stands(out: Path) -> Generator[None]:
    """After Ctrl-C outside of the steps, while the run loads or the student is written, say what is there of the run."""
    try:
        yield
    except KeyboardInterrupt:
        if _is_first():
            click.echo(f"\nstopped. {_standing(out)}", err=True)
        sys.exit(INTERRUPTED)


def _standing(out: Path) -> str:
    from trainer.run.checkpoint import checkpoints
    from trainer.run.folder import CHECKPOINTS, RUN_FILE

    try:
        saved = checkpoints(out / CHECKPOINTS)
    except OSError as exc:
        return f"{out / CHECKPOINTS} cannot be listed ({exc.strerror})."
    if saved:
        return f"{saved[-1].name} is whole: the same command goes on from it."
    if (out / RUN_FILE).exists():
        return "No step was saved yet: the same command starts again."
    return "Nothing was written yet."


if __name__ == "__main__":  # torchrun --nproc-per-node 8 -m trainer.cli ...
    main()
