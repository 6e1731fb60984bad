"""The commands radio-eval all and radio-eval report: one page about a run, with every evaluation or with k-NN alone."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from evals.commands.knn import print_knn
from evals.commands.shared import AGAIN, PATH, ProgressLines, device_option, sampling_options, write_record
from radio_cache.errors import ConfigError, unknown_name
from radio_cache.statistics.knn_protocol import PAPER_K
from radio_cache.terminal.files import OutputFile
from radio_cache.terminal.options import renamed_option
from radio_cache.terminal.output import PATH_OR_URL, console, human_bytes, plain_errors, printable

if TYPE_CHECKING:
    from evals.shared.devices import Device

EVALUATIONS = ("zero-shot", "segment", "retrieve", "similarity", "rank", "mode-switch", "throughput")
"""Keys of `evals.report.sections.SECTIONS`, repeated so that the help needs no torch; a test compares them."""


@click.command()
@click.option("--run", type=PATH, required=True, metavar="FOLDER", help="Folder of a run of radio-train.")
@click.option(
    "--cache",
    type=PATH_OR_URL,
    metavar="PATH_OR_URL",
    help="Cache whose labelled images vote in k-NN (the bank). [default: the cache the run was trained on]",
)
@click.option(
    "--queries",
    type=PATH_OR_URL,
    metavar="PATH_OR_URL",
    help="Labelled images to classify and to draw. [default: those of --cache]",
)
@click.option("--out", type=OutputFile(".html", ".htm"), required=True, metavar="FILE", help="HTML file to write.")
@click.option(
    "--num-images",
    default=4,
    show_default=True,
    metavar="N",
    help="Number of images of each cache to draw as feature maps.",
)
@renamed_option("--shown", "--num-images")
@click.option(
    "-k", "--k", default=PAPER_K, show_default=True, metavar="N", help="Number of nearest neighbours that vote in k-NN."
)
@sampling_options()
@device_option
@plain_errors(on_interrupt=AGAIN)
def report(
    run: Path,
    cache: str | Path | None,
    queries: str | Path | None,
    out: Path,
    num_images: int,
    k: int,
    limit: int | None,
    seed: int,
    device: "Device",
) -> None:
    """Write an HTML report of a run: k-NN accuracy, loss curves, cache, and feature maps of teacher, cache and student.

    The page is a single file that needs no network.
    """
    from evals.report.page import ReportConfig, write_report

    config = ReportConfig(
        run=run,
        cache=cache,
        queries=queries,
        out=out,
        num_images=num_images,
        k=k,
        limit=limit,
        seed=seed,
        device=device,
    )
    with ProgressLines() as progress:
        result = write_report(config, progress=progress)
    # The same table as on the page, so that a terminal needs no browser.
    assert result.table is not None, "without other evaluations a table that cannot be made is an error"
    print_knn(result.table)
    console().print(f"\n{out} ({human_bytes(out.stat().st_size)})")


@click.command("all")
@click.option("--run", type=PATH, required=True, metavar="FOLDER", help="Folder of a run of radio-train.")
@click.option(
    "--cache",
    type=PATH_OR_URL,
    metavar="PATH_OR_URL",
    help="Cache whose labelled images vote in k-NN (the bank). [default: the cache the run was trained on]",
)
@click.option(
    "--queries",
    type=PATH_OR_URL,
    metavar="PATH_OR_URL",
    help="Images to evaluate on and to draw. [default: those of --cache]",
)
@click.option(
    "--out",
    type=OutputFile(".html", ".htm"),
    metavar="FILE",
    help="HTML file to write. The figures go to a .json file of the same name. [default: report.html in the folder of --run]",
)
@click.option(
    "--num-images",
    default=4,
    show_default=True,
    metavar="N",
    help="Number of images of each cache to draw as feature maps.",
)
@renamed_option("--shown", "--num-images")
@click.option(
    "-k", "--k", default=PAPER_K, show_default=True, metavar="N", help="Number of nearest neighbours that vote in k-NN."
)
@click.option(
    "--masks",
    type=PATH,
    nargs=2,
    metavar="IMAGES MASKS",
    help="Folder of images and folder of masks to evaluate segmentation on. [default: no segmentation]",
)
@click.option(
    "--classes",
    metavar="FILE|N|A,B,C",
    help="Classes in --masks: a file with one name per line, their number, or their names with commas.",
)
@click.option(
    "--skip", multiple=True, metavar="NAME", help=f"Evaluation to skip: {', '.join(EVALUATIONS)}. Repeatable."
)
@sampling_options()
@device_option
@plain_errors(on_interrupt=AGAIN)
def everything(
    run: Path,
    cache: str | Path | None,
    queries: str | Path | None,
    out: Path | None,
    num_images: int,
    k: int,
    masks: tuple[Path, Path] | None,
    classes: str | None,
    skip: tuple[str, ...],
    limit: int | None,
    seed: int,
    device: "Device",
) -> None:
    """Run every evaluation of a run, and write an HTML report with all figures, and a JSON file for scripts.

    The page is a single file that needs no network. Evaluations that this run does not allow (no labels, no masks, no CLIP
    adaptor) are listed on it with the reason.
    """
    from evals.report.page import ReportConfig, headline, page_record, write_report

    # Checked before anything runs: evaluations take minutes.
    for name in skip:
        if name not in EVALUATIONS:
            raise ConfigError("--skip: " + unknown_name("evaluation", name, EVALUATIONS))
    # Beside the run by default, as its metrics are.
    page_file = out or run / "report.html"
    config = ReportConfig(
        run=run,
        cache=cache,
        queries=queries,
        out=page_file,
        num_images=num_images,
        k=k,
        masks=masks,
        classes=classes,
        limit=limit,
        seed=seed,
        # In the order of the page, whatever the order of --skip.
        sections=tuple(name for name in EVALUATIONS if name not in skip),
        device=device,
    )
    with ProgressLines() as progress:
        page = write_report(config, progress=progress)
    # Figures for scripts, from the same evaluations as the page.
    write_record(page_file.with_suffix(".json"), page_record(page), config)
    if page.table is not None:
        print_knn(page.table)
    for evaluation in page.not_run:
        console().print(f"not run: {evaluation.name}: {printable(evaluation.reason)}")
    if page.table is not None:
        console().print(f"\n{headline(page.student, page.table)}")
    console().print(f"\n{page_file} ({human_bytes(page_file.stat().st_size)})")
