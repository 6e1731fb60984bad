"""radio-eval knn."""

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from evals.commands.shared import AGAIN, IMAGES, Drawn, ProgressLines, compared, drawn, json_option, write_record
from radio_cache.statistics.knn_protocol import PAPER_K, PAPER_TEMPERATURE
from radio_cache.terminal.output import PLACE, console, plain_errors, table

if TYPE_CHECKING:
    from evals.knn.table import KnnTable


@click.command()
@click.option(
    "--bank",
    "--cache",
    "bank",
    type=PLACE,
    metavar="PLACE",
    help=f"Labelled images to compare with: {IMAGES}. Default: the cache the run learned from.",
)
@click.option(
    "--queries", type=PLACE, metavar="PLACE", help="Labelled images to classify. Default: each of the bank's in turn."
)
@compared
@click.option("-k", "--k", default=PAPER_K, show_default=True, help="Neighbours that vote.")
@click.option(
    "--sweep", multiple=True, type=int, metavar="K", help="Also show accuracy by K neighbours. May be given again."
)
@click.option("--temperature", default=PAPER_TEMPERATURE, show_default=True, help="Of the votes, exp(similarity / T).")
@drawn()
@json_option
@plain_errors(on_interrupt=AGAIN)
def knn(
    bank: str | Path | None,
    queries: str | Path | None,
    k: int,
    sweep: tuple[int, ...],
    temperature: float,
    json_file: Path | None,
    **encoders: Unpack[Drawn],
) -> None:
    """k-NN accuracy of the teachers in a cache, of students, of the same students untrained, and of any model.

    Nothing is trained: every image is classified by the labels of the k images whose summaries are most like its own.
    """
    from evals.knn.table import KnnConfig, run_knn

    config = KnnConfig(bank=bank, queries=queries, k=k, sweep=sweep, temperature=temperature, **encoders)
    with ProgressLines() as progress:
        result = run_knn(config, progress=progress)
    print_knn(result)
    write_record(json_file, result.to_json(), config)


def print_knn(result: "KnnTable") -> None:
    """The table, what it needs to be believed, and accuracy by k where several were asked for."""
    out = console()
    out.print(result.protocol)
    shown = table("", "", "what it is", "width", "top-1", "top-5", "of best teacher", left=2)
    for row in result.rows:
        share = "" if row.share_of_best_teacher is None else f"{row.share_of_best_teacher:.1%}"
        shown.add_row(row.name, row.about, str(row.width), f"{row.top1:.1%}", f"{row.top5:.1%}", share)
    for paper in result.paper:
        shown.add_row(paper.name, f"reported, {paper.px} px", "", f"{paper.knn:.1f}%", "", "")
    out.print(shown)
    if len(result.rows[0].by_k) > 1:
        ks = sorted(result.rows[0].by_k)
        out.print("\ntop-1 by the number of neighbours")
        by_k = table("", "", *(f"k = {k}" for k in ks))
        for row in result.rows:
            by_k.add_row(row.name, *(f"{row.by_k[k].top1:.1%}" for k in ks))
        out.print(by_k)
    for note in result.notes:
        out.print(f"note: {note}")
