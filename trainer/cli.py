"""`radio-train`: a student from a cache."""

import sys
from dataclasses import replace
from pathlib import Path

import click

from radio_cache import __version__
from radio_cache.cli_support import PLACE, console, plain_errors, table
from radio_cache.errors import ConfigError

TERMINATED = 143
"""Exit code after SIGTERM or Ctrl-C with a checkpoint saved; schedulers requeue on it."""


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="radio-train")
@click.option(
    "--cache", required=True, type=PLACE, metavar="CACHE.zarr", help="Made by `radio-cache build`: a folder, or a URL."
)
@click.option(
    "--student",
    metavar="NAME",
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
    default="quick",
    show_default=True,
    metavar="NAME",
    help="quick, am-radio, demo, or a run's recipe.json.",
)
@click.option("--steps", type=int, metavar="N", help="Optimiser steps. [default: the recipe's]")
@click.option("--batch-size", type=int, metavar="N", help="Images in a step. [default: the recipe's]")
@click.option(
    "--image-size", type=int, metavar="PX", help="Side of the crops the student sees. [default: the recipe's]"
)
@click.option("--lr", type=float, help="Peak learning rate. [default: the recipe's]")
@click.option("--seed", type=int, help="Of weights, order and crops. [default: the recipe's]")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any other setting of the recipe, such as crop_area=0.5,1. Repeatable.",
)
@click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one."
)
@plain_errors(on_interrupt="Nothing was written yet.")
def main(
    cache: str | Path, student: str | None, out: Path, teachers: tuple[str, ...], recipe: str, steps: int | None,
    batch_size: int | None, image_size: int | None, lr: float | None, seed: int | None, settings: tuple[str, ...], device: str,
) -> None:  # fmt: skip
    """Train a student on the cached features of its teachers, with fresh random crops. No teacher runs.

    Stopped at any moment, the same command goes on where the last checkpoint was, and gives the same weights as a run
    that was never stopped. The run's folder holds student.safetensors, recipe.json, metrics.jsonl and TensorBoard events.
    """
    from radio_cache.torch import pick_device
    from trainer.loop import TrainConfig, train
    from trainer.recipes import find_recipe, with_settings

    pairs = [text.partition("=") for text in settings]
    for key, equals, _ in pairs:
        if not equals:
            raise ConfigError(f"--set {key}: write it as KEY=VALUE")
    chosen = with_settings(find_recipe(recipe), {key: value for key, _, value in pairs})
    given = {
        "student": student,
        "steps": steps,
        "batch_images": batch_size,
        "image_px": image_size,
        "lr": lr,
        "seed": seed,
    }
    chosen = replace(chosen, **{name: value for name, value in given.items() if value is not None})
    config = TrainConfig(cache=cache, recipe=chosen, out=out, teachers=teachers, device=pick_device(device))
    report = train(config, say=lambda text: click.echo(text, err=True))
    if report.stopped:
        click.echo(
            f"stopped at step {report.steps} with a checkpoint saved. The same command goes on from there.", err=True
        )
        sys.exit(TERMINATED)
    console().print(loss_table(out))
    click.echo(
        f"\n{report.steps} steps ({report.steps - report.steps_before} now) in {report.seconds:.0f} s."
        f" Student: {out}/student.safetensors"
        f"\nNext: radio-eval knn --run {out}\n      radio-export --run {out} --out student/"
    )


def loss_table(out: Path) -> object:
    """Losses per teacher at the first and at the last log line."""
    import json

    from trainer.loop import METRICS_FILE

    lines = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]
    rows = table("losses", "teacher", "summary, first", "last", "spatial, first", "last")
    for name, first in lines[0]["teachers"].items():
        last = lines[-1]["teachers"][name]
        parts = [first["summary"], last["summary"], first["spatial"], last["spatial"]]
        rows.add_row(name, *("-" if value is None else f"{value:.3f}" for value in parts))
    return rows
