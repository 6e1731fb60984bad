"""The commands radio-eval rank, mode-switch, retrieve and similarity: properties of features, without labels."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from evals.commands.shared import (
    AGAIN,
    IMAGES,
    PATH,
    EncoderOptions,
    ProgressLines,
    SampledEncoderOptions,
    device_option,
    encoder_options,
    json_option,
    sampling_options,
    seed_option,
    write_record,
)
from radio_cache.terminal.files import PICTURE_ENDINGS, OutputFile, save_picture, write_output
from radio_cache.terminal.options import renamed_option
from radio_cache.terminal.output import PATH_OR_URL, console, plain_errors, table

if TYPE_CHECKING:
    from evals.features.mode_switch import ModeSwitchTable
    from evals.features.rank import RankTable
    from evals.shared.devices import Device
    from radio_cache.view.picture_grid import Pane

_images = click.option(
    "--images",
    "--cache",
    "images",
    type=PATH_OR_URL,
    metavar="PLACE",
    help=f"Images: {IMAGES}. The teachers of a cache are compared, too. Default: the cache the run was trained on.",
)
_picture = click.option(
    "--out", type=OutputFile(*PICTURE_ENDINGS), required=True, metavar="FILE.png", help="The picture to write."
)


@click.command()
@_images
@encoder_options
@sampling_options(2000)
@json_option
@plain_errors(on_interrupt=AGAIN)
def rank(images: str | Path | None, json_file: Path | None, **encoders: Unpack[SampledEncoderOptions]) -> None:
    """Measure the effective rank of summaries (RankMe), and their similarity to every teacher (linear CKA), without labels."""
    from evals.features.rank import RankConfig, run_rank

    config = RankConfig(images=images, **encoders)
    with ProgressLines() as progress:
        result = run_rank(config, progress=progress)
    print_rank(result)
    write_record(json_file, result.to_json(), config)


@click.command("mode-switch")
@click.option("--run", type=PATH, required=True, help="Folder of a training run.")
@click.option(
    "--cache",
    type=PATH_OR_URL,
    metavar="CACHE",
    help="Cache with the teachers. Default: the cache the run was trained on.",
)
@click.option(
    "--size", "sizes", type=int, multiple=True, metavar="PX", help="Size of the student's input. May be given again."
)
@sampling_options(100)
@click.option("--plot", type=OutputFile(".svg"), metavar="FILE.svg", help="Draw cosine over sizes.")
@json_option
@device_option
@plain_errors(on_interrupt=AGAIN)
def mode_switch(
    run: Path,
    cache: str | Path | None,
    sizes: tuple[int, ...],
    limit: int,
    seed: int,
    plot: Path | None,
    json_file: Path | None,
    device: "Device",
) -> None:
    """Compare a student with each teacher at several sizes of its input: cosine, and variance over error (fidelity)."""
    # A student's predictions are evaluated, so other models make no sense here.
    from evals.features.mode_switch import ModeSwitchConfig, run_mode_switch

    config = ModeSwitchConfig(run=run, cache=cache, sizes=sizes, limit=limit, seed=seed, device=device)
    with ProgressLines() as progress:
        result = run_mode_switch(config, progress=progress)
    print_mode_switch(result)
    write_record(json_file, result.to_json(), config)
    if plot is not None:
        write_output(plot, result.chart().encode())
        console().print(f"\n{plot}")


@click.command()
@_images
@encoder_options
@click.option("--queries", default=4, show_default=True, help="Number of query images.")
@click.option("-k", "--k", default=6, show_default=True, help="Number of neighbours of each query.")
@sampling_options()
@_picture
@plain_errors(on_interrupt=AGAIN)
def retrieve(
    images: str | Path | None, queries: int, k: int, out: Path, **encoders: Unpack[SampledEncoderOptions]
) -> None:
    """Draw the nearest images of a few queries by every encoder: the query left, green borders for its class."""
    from evals.features.retrieve import RetrieveConfig, run_retrieve

    config = RetrieveConfig(images=images, queries=queries, k=k, **encoders)
    with ProgressLines() as progress:
        rows = run_retrieve(config, progress=progress)
    _save(rows, out)


@click.command()
@_images
@encoder_options
@click.option("--num-images", default=3, show_default=True, help="Number of images to draw.")
@renamed_option("--shown", "--num-images")
@click.option("--anchors", default=3, show_default=True, help="Tokens of each image that all others are compared with.")
@seed_option
@_picture
@plain_errors(on_interrupt=AGAIN)
def similarity(
    images: str | Path | None, num_images: int, anchors: int, seed: int, out: Path, **encoders: Unpack[EncoderOptions]
) -> None:
    """Draw the cosine of all tokens of an image with a few of them, chosen to be unlike each other, as heat maps."""
    from evals.features.similarity import SimilarityConfig, run_similarity

    config = SimilarityConfig(images=images, num_images=num_images, anchors=anchors, seed=seed, **encoders)
    with ProgressLines() as progress:
        rows = run_similarity(config, progress=progress)
    _save(rows, out)


def print_rank(result: "RankTable") -> None:
    """Print the table and notes."""
    out = console()
    out.print(result.protocol)
    # Headings are wrapped, so that there is room for the names of rows.
    teachers = ("\n".join(["CKA", *textwrap.wrap(name, 13, break_long_words=False)]) for name in result.teachers)
    rows = table("", "", "description", "width", "RankMe", *teachers, left=2)
    for row in result.rows:
        cka = (f"{row.cka[name]:.3f}" for name in result.teachers)
        rows.add_row(row.name, row.about, str(row.width), f"{row.rank:.1f}", *cka)
    out.print(rows)
    for note in result.notes:
        out.print(f"note: {note}")


def print_mode_switch(result: "ModeSwitchTable") -> None:
    """Print the table and notes."""
    out = console()
    out.print(result.protocol)
    rows = table("", "teacher", "px", "cosine", "fidelity", "summary cosine")
    # The sizes of one teacher stand below each other.
    for row in sorted(result.rows, key=lambda row: (row.teacher, row.size_px)):
        summary = "–" if row.summary_cosine is None else f"{row.summary_cosine:.3f}"
        rows.add_row(row.teacher, str(row.size_px), f"{row.cosine:.3f}", f"{row.fidelity:.2f}", summary)
    out.print(rows)
    for note in result.notes:
        out.print(f"note: {note}")


def _save(panes: "Sequence[Sequence[Pane]]", file: Path) -> None:
    from radio_cache.view.picture_grid import picture_grid

    # The endings of the option decide the format.
    save_picture(file, picture_grid(panes))
    console().print(str(file))
