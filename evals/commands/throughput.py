"""The command radio-eval throughput."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, cast

import click

from evals.commands.shared import AGAIN, PATH, EncoderOptions, ProgressLines, encoder_options, json_option, write_record
from radio_cache.errors import ConfigError
from radio_cache.terminal.files import OutputFile, write_output
from radio_cache.terminal.output import console, plain_errors, table

if TYPE_CHECKING:
    from evals.throughput import Mode, Precision, ThroughputTable


@click.command()
@encoder_options
@click.option(
    "--batch-size",
    "batches",
    type=int,
    multiple=True,
    default=(1, 16),
    show_default=True,
    metavar="N",
    help="Images per batch. Repeatable.",
)
@click.option(
    "--mode",
    "modes",
    multiple=True,
    type=click.Choice(["eager", "channels-last", "compiled"]),
    default=("eager",),
    show_default=True,
    help="Execution mode of the networks. Repeatable.",
)
@click.option(
    "--dtype",
    "precisions",
    multiple=True,
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default=("float32",),
    show_default=True,
    help="Precision of the networks; 16-bit types run under autocast. Repeatable.",
)
@click.option(
    "--repeats",
    default=5,
    show_default=True,
    metavar="N",
    help="Minimum number of batches to time; the median is reported.",
)
@click.option(
    "--warmup", default=2, show_default=True, metavar="N", help="Number of batches to run before timing starts."
)
@click.option(
    "--quality",
    type=PATH,
    metavar="FILE",
    help="JSON file that radio-eval knn, zero-shot or segment wrote with --json, for --plot.",
)
@click.option(
    "--plot",
    type=OutputFile(".svg"),
    metavar="FILE",
    help="Plot quality over speed to this SVG file. Needs --quality.",
)
@json_option
@plain_errors(on_interrupt=AGAIN)
def throughput(
    batches: tuple[int, ...],
    modes: tuple[str, ...],
    precisions: tuple[str, ...],
    repeats: int,
    warmup: int,
    quality: Path | None,
    plot: Path | None,
    json_file: Path | None,
    **encoders: Unpack[EncoderOptions],
) -> None:
    """Measure images per second, parameters, FLOPs and memory of students, teachers and other models."""
    from evals.throughput import ThroughputConfig, run_throughput

    # Checked before the measurement, which takes minutes.
    if (plot is None) != (quality is None):
        raise ConfigError(
            "--plot FILE.svg and --quality FILE.json go together: the plot shows the quality of that file over speed"
        )
    config = ThroughputConfig(
        batches=batches,
        modes=cast("tuple[Mode, ...]", modes),
        precisions=cast("tuple[Precision, ...]", precisions),
        repeats=repeats,
        warmup=warmup,
        **encoders,
    )
    # Read before the measurement, too: a damaged file is an early error.
    quality_of = None if quality is None else read_quality(quality)
    with ProgressLines() as progress:
        result = run_throughput(config, progress=progress)
    print_throughput(result)
    write_record(json_file, result.to_json(), config)
    if plot is not None and quality_of is not None:
        write_output(plot, result.quality_chart(*quality_of).encode())
        console().print(f"\n{plot}")


def read_quality(file: Path) -> tuple[dict[str, float], str]:
    """Read name -> per cent, and the title of the metric, from a record of k-NN, zero-shot or segmentation.

    Raises:
        ConfigError: if the file is no such record.
    """
    try:
        # Records of k-NN and zero-shot have top1, those of segmentation have scores.
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        if "top1" in rows[0]:
            return {row["name"]: 100 * row["top1"] for row in rows}, "top-1, %"
        return {row["name"]: 100 * row["scores"]["mean_iou"] for row in rows}, "mIoU, %"
    except (OSError, ValueError, KeyError, IndexError, TypeError) as exc:
        raise ConfigError(
            f"--quality {file} is not a record of radio-eval knn, zero-shot or segment --json: {exc!r}"
        ) from exc


def print_throughput(result: "ThroughputTable") -> None:
    """Print the table and notes."""
    out = console()
    out.print(result.protocol)
    rows = table("", "", "M params", "GFLOPs", "px", "mode", "dtype", "batch", "images/s", "range", "peak MB")
    for row in result.rows:
        peak = "–" if row.peak_mb is None else f"{row.peak_mb:,.0f}"
        rows.add_row(
            row.name,
            f"{row.params_m:,.1f}",
            f"{row.gflops:,.2f}",
            str(row.input_px),
            row.mode,
            row.precision,
            str(row.batch),
            f"{row.images_per_s:,.1f}",
            f"{row.slowest:,.0f}–{row.fastest:,.0f}",
            peak,
        )
    out.print(rows)
    for note in result.notes:
        out.print(f"note: {note}")
