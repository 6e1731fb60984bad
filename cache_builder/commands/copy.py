"""`radio-cache copy`: copy a cache, or a part of it."""

import os
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from cache_builder.commands.build import SAME_COMMAND
from radio_cache.terminal.help import SectionedCommand
from radio_cache.terminal.output import PATH_OR_URL, console, human_bytes, plain_errors, print_line, table

if TYPE_CHECKING:
    from cache_builder.copying import CopyReport


@click.command(
    cls=SectionedCommand,
    sections={
        "Selection": ("teachers", "filters", "limit", "fraction", "seed"),
        "Codec": ("packing", "fidelity"),
        "Speed": ("threads",),
    },
    examples=(
        "radio-cache copy cache.zarr s3://bucket/cache.zarr",
        "radio-cache copy cache.zarr small.zarr --teacher dinov2 --fraction 0.1",
        "radio-cache copy cache.zarr archive.zarr --packing zstd",
    ),
)
@click.argument("source", type=PATH_OR_URL)
@click.argument("target", type=PATH_OR_URL)
@click.option(
    "--teacher", "teachers", multiple=True, metavar="NAME", help="Copy only this teacher. Repeatable. [default: all]"
)
@click.option(
    "--fraction",
    type=float,
    metavar="SHARE",
    help="Copy a random sample of this share of the images, such as 0.1. The same --seed gives the same sample. "
    "[default: all]",
)
@click.option("--seed", default=0, metavar="N", show_default=True, help="Seed of the sample of --fraction.")
@click.option(
    "--limit", type=int, metavar="N", help="Copy only the first N images, counted after --filter. [default: all]"
)
@click.option(
    "--filter",
    "filters",
    multiple=True,
    metavar="GLOB",
    help="Copy only images whose key matches, such as 'cat/*'. '!cat/*' excludes them. Repeatable.",
)
@click.option(
    "--packing",
    type=click.Choice(["packed", "zstd", "ans"]),
    metavar="PACKING",
    help="Packing of klt teachers in the copy: packed (fastest to read), zstd (smaller) or ans (smallest). Changing it encodes "
    "their maps again, which loses a little; the loss is printed and recorded. [default: unchanged, lossless]",
)
@click.option(
    "--fidelity",
    type=float,
    metavar="COSINE",
    help="Mean cosine similarity to the stored maps that encoding again keeps, below 1. [default: adds a quarter of the "
    "loss already recorded]",
)
@click.option(
    "--threads", type=int, metavar="N", help="Shards to copy at the same time. [default: one per core, at most 4]"
)
@plain_errors(on_interrupt=SAME_COMMAND)
def copy(threads: int | None, **options: Any) -> None:
    """Copy the cache SOURCE, or a part of it, to TARGET. Each is a folder or a URL such as s3://bucket/cache.zarr.

    All bytes are checked against their checksums while they are read. Shards that need no change are copied unchanged, and
    images keep their order, labels, failures and source paths. The same command continues a copy that was stopped; with
    another --teacher it adds that teacher.
    """
    from cache_builder.copying import CopyConfig, copy_cache

    config = CopyConfig(threads=min(4, os.cpu_count() or 1) if threads is None else threads, **options)
    report = copy_cache(config, on_message=print_line)
    console().print(_table(report))
    click.echo(f"\n{report.target.url} is complete. Check it: radio-cache verify --deep {report.target.url}")


def _table(report: "CopyReport") -> Table:
    from radio_cache.view.info import cosine, teacher_infos

    infos = {info.name: info for info in teacher_infos(report.target)}
    rows = table("", "copied", "shards", "codec", "cosine", "bits/value", "written", left=2)
    for unit in report.units:
        info = infos.get(unit.name)
        codec_cells = (
            ("", "", "") if info is None else (info.codec, cosine(info.fidelity), f"{info.bits_per_value:.2f}")
        )
        # A part of a cache reuses whole shards where it can; only the rest is made anew.
        counts = {
            "unchanged": unit.kept,
            "with selected images": unit.assembled,
            "encoded again": unit.transcoded,
            "copied before": unit.before,
        }
        shards = ", ".join(f"{count} {treatment}" for treatment, count in counts.items() if count)
        rows.add_row(unit.name, shards, *codec_cells, human_bytes(unit.num_bytes))
    return rows


__all__ = ["copy"]
