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
@click.option("--run", type=PATH, required=True, help="Folder of a training run.")
@click.option(
    "--cache", type=PATH_OR_URL, help="The bank of labelled images. Default: the cache the run was trained on."
)
@click.option("--queries", type=PATH_OR_URL, help="Labelled images to classify and draw. Default: those of the bank.")
@click.option("--out", type=OutputFile(".html", ".htm"), required=True, help="The HTML file to write.")
@click.option("--num-images", default=4, show_default=True, help="Images of each cache to draw as feature maps.")
@renamed_option("--shown", "--num-images")
@click.option("-k", "--k", default=PAPER_K, show_default=True, help="Number of neighbours that vote.")
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
    """Write one HTML page about a run: k-NN, loss curves, feature maps of teacher, cache and student, the cache.

    The page is a single file that needs no network: mail it, or open it on a phone.
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
    assert result.table is not None, "without other evaluations a table that cannot be made is an error"
    print_knn(result.table)
    console().print(f"\n{out} ({human_bytes(out.stat().st_size)})")


@click.command("all")
@click.option("--run", type=PATH, required=True, help="Folder of a training run.")
@click.option(
    "--cache", type=PATH_OR_URL, help="The bank of labelled images. Default: the cache the run was trained on."
)
@click.option("--queries", type=PATH_OR_URL, help="Images to evaluate on and to draw. Default: those of the bank.")
@click.option(
    "--out",
    type=OutputFile(".html", ".htm"),
    help="The HTML file to write; a .json of the same name beside it. Default: RUN/report.html.",
)
@click.option("--num-images", default=4, show_default=True, help="Images of each cache to draw as feature maps.")
@renamed_option("--shown", "--num-images")
@click.option("-k", "--k", default=PAPER_K, show_default=True, help="Number of neighbours that vote in k-NN.")
@click.option(
    "--masks", type=PATH, nargs=2, metavar="IMAGES MASKS", help="For segmentation: folders of images and masks."
)
@click.option("--classes", metavar="FILE|N|A,B,C", help="Names of the classes in --masks.")
@click.option(
    "--skip", multiple=True, metavar="NAME", help=f"Skip an evaluation: {', '.join(EVALUATIONS)}. May be given again."
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
    """Run every evaluation of a run and write one self-contained page, report.html, and its figures, report.json.

    What cannot be evaluated for this run (no labels, no masks, no CLIP head) is listed on the page with the reason.
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
