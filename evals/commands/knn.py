"""The command radio-eval knn."""

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from evals.commands.shared import (
    AGAIN,
    IMAGES,
    ProgressLines,
    SampledEncoderOptions,
    encoder_options,
    json_option,
    sampling_options,
    write_record,
)
from radio_cache.statistics.knn_protocol import PAPER_K, PAPER_TEMPERATURE
from radio_cache.terminal.options import renamed_option
from radio_cache.terminal.output import PATH_OR_URL, console, plain_errors, table

if TYPE_CHECKING:
    from evals.knn.table import KnnTable


@click.command()
@click.option(
    "--bank",
    type=PATH_OR_URL,
    metavar="PATH_OR_URL",
    help=f"Labelled images that vote: {IMAGES}. [default: the cache the run was trained on]",
)
# From when a bank was always a cache.
@renamed_option("--cache", "--bank")
@click.option(
    "--queries",
    type=PATH_OR_URL,
    metavar="PATH_OR_URL",
    help="Labelled images to classify. [default: each image of the bank, by all others]",
)
@encoder_options
@click.option(
    "-k", "--k", default=PAPER_K, show_default=True, metavar="N", help="Number of nearest neighbours that vote."
)
@click.option(
    "--sweep", multiple=True, type=int, metavar="N", help="Also report the accuracy for N neighbours. Repeatable."
)
@click.option(
    "--temperature",
    default=PAPER_TEMPERATURE,
    show_default=True,
    metavar="T",
    help="Temperature of the votes: a neighbour votes with weight exp(similarity / T).",
)
@sampling_options()
@json_option
@plain_errors(on_interrupt=AGAIN)
def knn(
    bank: str | Path | None,
    queries: str | Path | None,
    k: int,
    sweep: tuple[int, ...],
    temperature: float,
    json_file: Path | None,
    **encoders: Unpack[SampledEncoderOptions],
) -> None:
    """Measure the k-NN accuracy of cached teachers, of students trained and untrained, and of other models.

    Nothing is trained: every image is classified by the labels of the k images with the most similar summaries.
    """
    # Imported here: it loads torch and FAISS, which --help does not need.
    from evals.knn.table import KnnConfig, run_knn

    config = KnnConfig(bank=bank, queries=queries, k=k, sweep=sweep, temperature=temperature, **encoders)
    with ProgressLines() as progress:
        result = run_knn(config, progress=progress)
    print_knn(result)
    write_record(json_file, result.to_json(), config)


def print_knn(result: "KnnTable") -> None:
    """Print the table, accuracy by k if there are several, and notes."""
    out = console()
    out.print(result.protocol)
    rows = table("", "", "description", "width", "top-1", "top-5", "of best teacher", left=2)
    for row in result.rows:
        share = "" if row.share_of_best_teacher is None else f"{row.share_of_best_teacher:.1%}"
        rows.add_row(row.name, row.about, str(row.width), f"{row.top1:.1%}", f"{row.top5:.1%}", share)
    # Published rows only appear on the full validation set of ImageNet.
    for paper in result.paper:
        rows.add_row(paper.name, f"reported, {paper.px} px", "", f"{paper.knn:.1f}%", "", "")
    out.print(rows)
    # k itself is in by_k: a second number comes from --sweep.
    if len(result.rows[0].by_k) > 1:
        ks = sorted(result.rows[0].by_k)
        out.print("\ntop-1 by the number of neighbours")
        table_by_k = table("", "", *(f"k = {k}" for k in ks))
        for row in result.rows:
            table_by_k.add_row(row.name, *(f"{row.by_k[k].top1:.1%}" for k in ks))
        out.print(table_by_k)
    for note in result.notes:
        out.print(f"note: {note}")
