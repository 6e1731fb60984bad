"""`radio-cache copy`: copy a cache, or a part of it."""

import os
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from radio_cache.terminal.help import SectionedCommand
from radio_cache.terminal.output import PATH_OR_URL, console, human_bytes, plain_errors, print_line, table

if TYPE_CHECKING:
    from cache_builder.copying import CopyReport


@click.command(
    cls=SectionedCommand,
    sections={
        "What is copied": ("teachers", "filters", "limit", "fraction", "seed"),
        "How it is stored": ("packing", "fidelity"),
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
@click.option("--teacher", "teachers", multiple=True, metavar="NAME", help="Copy only this teacher. Repeatable.")
@click.option(
    "--fraction",
    type=float,
    metavar="PART",
    help="Copy a random sample of the images, such as 0.1; the same for everybody who asks for it with the same --seed.",
)
@click.option("--seed", default=0, metavar="N", show_default=True, help="Of the sample that --fraction takes.")
@click.option("--limit", type=int, metavar="N", help="Copy only the first N images (after --filter).")
@click.option(
    "--filter",
    "filters",
    multiple=True,
    metavar="GLOB",
    help="Copy only images whose key matches, such as 'cat/*'; with a ! in front leave those out. Repeatable.",
)
@click.option(
    "--packing",
    type=click.Choice(["packed", "zstd"]),
    help="Packing of klt teachers in the copy. Another one than theirs is encoded again, which loses a little: how much is "
    "said and recorded. [default: as they are, lossless]",
)
@click.option(
    "--fidelity",
    type=float,
    metavar="COSINE",
    help="Mean cosine that encoding again keeps with what is stored. [default: loses a quarter of what was lost before]",
)
@click.option("--threads", type=int, metavar="N", help="Shards copied at a time. [default: one per core, 4 at most]")
@plain_errors(on_interrupt="Nothing is lost: the same command goes on where this one stopped.")
def copy(threads: int | None, **options: Any) -> None:
    """Copy the cache SOURCE, or a part of it, to TARGET; each is a folder or a URL such as s3://bucket/cache.zarr.

    Every byte read is compared with its checksum. What needs no change is copied as it is; images keep their order, labels,
    failures and places. Killed at any moment, the same command goes on; with another --teacher it adds that one.
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
        counts = {
            "as they are": unit.kept,
            "of chosen rows": unit.assembled,
            "encoded again": unit.transcoded,
            "there before": unit.before,
        }
        shards = ", ".join(f"{count} {how}" for how, count in counts.items() if count)
        rows.add_row(unit.name, shards, *codec_cells, human_bytes(unit.num_bytes))
    return rows


__all__ = ["copy"]
