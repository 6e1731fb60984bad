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
    type=PATH_OR_URL,
    metavar="PATH_OR_URL",
    help=f"Images to evaluate on: {IMAGES}. The teachers of a cache are evaluated, too. [default: the cache the run was trained "
    "on]",
)
_cache_is_images = renamed_option("--cache", "--images")
_picture = click.option(
    "--out", type=OutputFile(*PICTURE_ENDINGS), required=True, metavar="FILE", help="PNG or JPEG file to write."
)


@click.command()
@_images
@_cache_is_images
@encoder_options
@sampling_options(2000)
@json_option
@plain_errors(on_interrupt=AGAIN)
def rank(images: str | Path | None, json_file: Path | None, **encoders: Unpack[SampledEncoderOptions]) -> None:
    """Measure the effective rank of summaries (RankMe) and their similarity to each teacher's (linear CKA), without labels."""
    from evals.features.rank import RankConfig, run_rank

    config = RankConfig(images=images, **encoders)
    with ProgressLines() as progress:
        result = run_rank(config, progress=progress)
    print_rank(result)
    write_record(json_file, result.to_json(), config)


@click.command("mode-switch")
@click.option("--run", type=PATH, required=True, metavar="FOLDER", help="Folder of a run of radio-train.")
@click.option(
    "--cache",
    type=PATH_OR_URL,
    metavar="PATH_OR_URL",
    help="Cache with the features of the teachers. [default: the cache the run was trained on]",
)
@click.option(
    "--size",
    "sizes",
    type=int,
    multiple=True,
    metavar="PX",
    help="Side of the student's input in pixels. Repeatable. [default: half to twice the training size]",
)
@sampling_options(100)
@click.option("--plot", type=OutputFile(".svg"), metavar="FILE", help="Plot cosine over input size to this SVG file.")
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
    """Measure how well a student predicts each teacher at several input sizes: cosine similarity and fidelity.

    Fidelity is the variance of the teacher's features over the mean squared error of the student's prediction. A jump
    between two sizes is a mode switch.
    """
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
@_cache_is_images
@encoder_options
# Not --queries, which are images elsewhere.
@click.option(
    "--num-queries", default=4, show_default=True, metavar="N", help="Number of query images, drawn at random."
)
@renamed_option("--queries", "--num-queries")
@click.option(
    "-k", "--k", default=6, show_default=True, metavar="N", help="Number of nearest images to draw for each query."
)
@sampling_options()
@_picture
@plain_errors(on_interrupt=AGAIN)
def retrieve(
    images: str | Path | None, num_queries: int, k: int, out: Path, **encoders: Unpack[SampledEncoderOptions]
) -> None:
    """Draw the most similar images to a few query images, as every encoder ranks them.

    The query is on the left. Images of its class have a green border.
    """
    from evals.features.retrieve import RetrieveConfig, run_retrieve

    config = RetrieveConfig(images=images, num_queries=num_queries, k=k, **encoders)
    with ProgressLines() as progress:
        rows = run_retrieve(config, progress=progress)
    _save(rows, out)


@click.command()
@_images
@_cache_is_images
@encoder_options
@click.option("--num-images", default=3, show_default=True, metavar="N", help="Number of images to draw.")
@renamed_option("--shown", "--num-images")
@click.option(
    "--anchors",
    default=3,
    show_default=True,
    metavar="N",
    help="Number of tokens of each image to compare with all others.",
)
@seed_option
@_picture
@plain_errors(on_interrupt=AGAIN)
def similarity(
    images: str | Path | None, num_images: int, anchors: int, seed: int, out: Path, **encoders: Unpack[EncoderOptions]
) -> None:
    """Draw heat maps of the cosine similarity between a few tokens of an image (anchors) and all its tokens.

    Anchors are chosen to differ from each other as much as possible.
    """
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
