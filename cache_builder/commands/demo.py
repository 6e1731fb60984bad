"""`radio-cache demo`: try everything offline, in a few minutes."""

import shutil
import sys
from pathlib import Path

import click

from cache_builder.commands.build import SAME_COMMAND
from radio_cache.terminal.output import plain_errors, printable_lines


@click.command()
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Folder of your own photos, at least two. [default: the photos that come with the package]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo-out"),
    show_default=True,
    metavar="FOLDER",
    help="Folder to write the caches, the run and the page to.",
)
@plain_errors(on_interrupt=SAME_COMMAND)
def demo(images: Path | None, out: Path) -> None:
    """Run the whole pipeline on bundled photos, offline, in a few minutes on two CPU cores.

    Cuts the photos into crops, caches the features of three ImageNet-trained teachers, trains a small student from the
    cache, compares it with the teachers by k-NN, and writes one HTML page with the table, the losses and pictures.
    """
    from cache_builder.demo.run import DemoConfig, run_demo

    report = run_demo(DemoConfig(out=out, images=images), on_message=lambda text: click.echo(printable_lines(text)))
    durations = ", ".join(f"{title} {seconds:.0f} s" for title, seconds in report.seconds.items())
    click.echo(f"\n{durations}.\n\nOpen {report.page.resolve()}: losses, and what teacher, cache and student see.")
    if images is None:
        # `make demo` leaves .venv inactive, so the command may not be on the path.
        command = "radio-cache" if shutil.which("radio-cache") else sys.argv[0]
        click.echo(f"Next, on your own photos: {command} demo --images FOLDER --out my-demo")
