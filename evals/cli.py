"""radio-eval: is the student any good, beside its teachers and beside an untrained one?"""

import json
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import click

from radio_cache import __version__
from radio_cache.cli_support import PLACE, ProgressLine, console, human_bytes, plain_errors, table
from radio_cache.storage import write_atomically

if TYPE_CHECKING:
    from evals.knn_table import KnnTable
    from evals.neighbours import Device

# The commands import what they run: torch takes seconds, and --help needs none of it.

PAPER_K, PAPER_TEMPERATURE = 20, 0.07
"""Defaults of `evals.knn`, repeated for the help; a test compares them."""

_AGAIN = "Nothing was written; the same command starts over."


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="radio-eval")
def main() -> None:
    """Evaluate students beside their teachers."""


_path = click.Path(path_type=Path)
_device = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
    help="Where students run and neighbours are searched.",
)  # fmt: skip


_IMAGES = "a cache, a folder with one subfolder per class, or tars such as 'train-{000..004}.tar'"
_models = click.option(
    "--model", "models", multiple=True, metavar="[NAME=]WHAT[@PX]",
    help="Anything else to compare: a run or export folder, teacher:NAME, timm:NAME, open_clip:NAME/WEIGHTS or "
    "FILE.onnx; @PX sets its input size. May be given again.",
)  # fmt: skip
_weights = click.option(
    "--weights", multiple=True, metavar="[NAME=]FILE",
    help="Local weights of a --model in its library's own format; 'random' for none.",
)  # fmt: skip


@main.command()
@click.option(
    "--bank", "--cache", "bank", type=PLACE, metavar="PLACE",
    help=f"Labelled images to compare with: {_IMAGES}. Default: the cache the run learned from.",
)  # fmt: skip
@click.option(
    "--queries", type=PLACE, metavar="PLACE", help="Labelled images to classify. Default: each of the bank's in turn."
)
@click.option("--run", "runs", type=_path, multiple=True, help="Folder of a training run. May be given again.")
@_models
@_weights
@click.option("-k", "--k", default=PAPER_K, show_default=True, help="Neighbours that vote.")
@click.option(
    "--sweep", multiple=True, type=int, metavar="K", help="Also show accuracy by K neighbours. May be given again."
)
@click.option("--temperature", default=PAPER_TEMPERATURE, show_default=True, help="Of the votes, exp(similarity / T).")
@click.option("--limit", type=int, help="Use at most so many images of each place, drawn at random.")
@click.option("--json", "json_file", type=_path, help="Write protocol, versions, image hashes and rows here.")
@_device
@plain_errors(on_interrupt=_AGAIN)
def knn(
    bank: str | Path | None, queries: str | Path | None, runs: tuple[Path, ...], models: tuple[str, ...],
    weights: tuple[str, ...], k: int, sweep: tuple[int, ...], temperature: float, limit: int | None,
    json_file: Path | None, device: "Device",
) -> None:  # fmt: skip
    """k-NN accuracy of the teachers in a cache, of students, of the same students untrained, and of any model.

    Nothing is trained: every image is classified by the labels of the k images whose summaries are most like its own.
    """
    from evals.knn_table import KnnConfig, run_knn
    from evals.versions import software_versions

    config = KnnConfig(
        bank=bank, queries=queries, runs=runs, models=models, weights=weights, k=k, sweep=sweep, temperature=temperature,
        limit=limit, device=device,
    )  # fmt: skip
    with _Progress() as progress:
        result = run_knn(config, progress=progress)
    if json_file is not None:
        record = {**result.to_json(), "versions": software_versions()}
        write_atomically(json_file, json.dumps(record, indent=1).encode())
    _print(result)


@main.command()
@click.option("--run", type=_path, required=True, help="Folder of a training run.")
@click.option("--cache", type=PLACE, help="The bank of labelled images. Default: the cache the run learned from.")
@click.option("--queries", type=PLACE, help="Labelled images to classify and show. Default: the bank's own.")
@click.option("--out", type=_path, required=True, help="The HTML file to write.")
@click.option("--images", default=4, show_default=True, help="Images of each cache shown as feature maps.")
@click.option("-k", "--k", default=PAPER_K, show_default=True, help="Neighbours that vote.")
@_device
@plain_errors(on_interrupt=_AGAIN)
def report(
    run: Path, cache: str | Path | None, queries: str | Path | None, out: Path, images: int, k: int, device: "Device"
) -> None:
    """One HTML page about a run: k-NN, loss curves, feature maps of teacher, cache and student, what is in the cache.

    The page is a single file that needs no network: mail it, or open it on a phone.
    """
    from evals.report import ReportConfig, write_report

    config = ReportConfig(run=run, cache=cache, queries=queries, out=out, images=images, k=k, device=device)
    with _Progress() as progress:
        result = write_report(config, progress=progress)
    _print(result)
    console().print(f"\n{out} ({human_bytes(out.stat().st_size)})")


def _print(result: "KnnTable") -> None:
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


class _Progress:
    """One progress line per encoder that runs a model, on standard error."""

    def __init__(self) -> None:
        self._line: ProgressLine | None = None
        self._name, self._done = "", 0

    def __call__(self, name: str, done: int, total: int) -> None:
        if name != self._name:
            self._close()
            self._name, self._done, self._line = name, 0, ProgressLine(name, total).__enter__()
        assert self._line is not None, "opened above for a new name, and kept until the next"
        self._line.advance(done - self._done)
        self._done = done

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._line is not None:
            self._line.__exit__(None, None, None)
            self._line = None
