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
    metavar="DIR",
    help="Your own photos instead of the bundled ones: a folder of two or more.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo-out"),
    show_default=True,
    metavar="DIR",
    help="Folder for everything that the demo writes.",
)
@plain_errors(on_interrupt=SAME_COMMAND)
def demo(images: Path | None, out: Path) -> None:
    """Run a whole example, offline, in a few minutes on two CPU cores.

    Cuts photographs into crops, runs three ImageNet-trained teachers over them once, trains a small student from the
    cache alone, compares all of them by k-NN, and writes one HTML page with the table, the losses and pictures.
    """
    from cache_builder.demo.run import DemoConfig, run_demo

    report = run_demo(DemoConfig(out=out, images=images), on_message=lambda text: click.echo(printable_lines(text)))
    durations = ", ".join(f"{title} {seconds:.0f} s" for title, seconds in report.seconds.items())
    click.echo(f"\n{durations}.\n\nOpen {report.page.resolve()}: losses, and what teacher, cache and student see.")
    if images is None:
        # `make demo` leaves .venv inactive, so the command may not be on the path.
        command = "radio-cache" if shutil.which("radio-cache") else sys.argv[0]
        click.echo(f"Next, on your own photos: {command} demo --images DIR --out my-demo")
