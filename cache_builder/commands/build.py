"""`radio-cache build`: run teachers over images and write their features to a cache."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from cache_builder.build_config import BATCH_IMAGES, BUILD_DEFAULTS
from radio_cache.terminal.help import SectionedCommand
from radio_cache.terminal.options import device_option
from radio_cache.terminal.output import PATH_OR_URL, console, human_bytes, plain_errors, print_line, table

if TYPE_CHECKING:
    from cache_builder.build import BuildReport
    from cache_builder.workers.pool import WorkerPool

SAME_COMMAND = "Nothing is lost: the same command goes on where this one stopped."
"""Hint after Ctrl-C."""

BUILD_SECTIONS = {
    "Images": (
        "images",
        "member",
        "filters",
        "limit",
        "shuffle_seed",
        "max_pixels",
        "rescan",
        "retry_unusable",
        "leave_out_unreadable",
    ),
    "Teachers": ("teachers", "weights", "size", "fit", "features", "views", "flip_views"),
    "Cache and codec": (
        "out",
        "codec",
        "fidelity",
        "step",
        "packing",
        "store_pixels",
        "pixels_as",
        "shard_images",
    ),
    "Speed": ("device", "dtype", "batch_size", "compiled", "threads"),
    "Processes and machines": ("workers", "scheduler", "cluster"),
}
"""Headings of the help, and the options below each."""

BUILD_EXAMPLES = (
    "radio-cache build --images photos/ --teacher efficientnet-lite0 --out c.zarr",
    "radio-cache build --images 'train-{000..999}.tar' --out c.zarr \\",
    "    --teacher clip --teacher dinov2 --teacher sam --fidelity sam=0.999",
    "radio-cache build ... --size 224 --size 448    # every teacher at two sizes",
    "radio-cache build ... --store-pixels 512       # training needs no other file",
)


@click.command(cls=SectionedCommand, sections=BUILD_SECTIONS, examples=BUILD_EXAMPLES)
@click.option(
    "--images",
    multiple=True,
    required=True,
    metavar="SOURCE",
    help="Folder (the first folder below is the class), WebDataset tar, folder of tars, pattern such as 'train-{000..004}.tar', "
    "Parquet with image bytes, or a text file with a path or URL a line; also at s3://, gs://, https://, hf:// "
    "(docs/sources.md). Repeatable.",
)
@click.option(
    "--member",
    default=BUILD_DEFAULTS["member"],
    metavar="ENDINGS",
    help="Ending of the photo among the members of a sample in a tar. Of several, such as 'jpg;png', the first that the sample "
    "has. "
    "[default: every image is a photo]",
)
@click.option(
    "--filter",
    "filters",
    multiple=True,
    metavar="GLOB",
    help="Use only images whose key matches, such as 'cat/*'; with a ! in front leave those out. Repeatable.",
)
@click.option("--limit", type=int, metavar="N", help="Use only the first N images, after --filter and --shuffle-seed.")
@click.option(
    "--shuffle-seed",
    type=int,
    metavar="SEED",
    help="Order the images at random, by this seed. Folders are sorted by class: without it the first N images are of a few "
    "classes, and so is every shard.",
)
@click.option(
    "--max-pixels",
    type=int,
    metavar="N",
    help=f"Refuse larger images before decoding them. [default: {BUILD_DEFAULTS['max_pixels'] / 1e6:.0f} million, or the limit "
    "of an existing cache]",
)
@click.option("--rescan", is_flag=True, help="List the sources again, even if nothing seems to have changed.")
@click.option(
    "--retry-unusable",
    is_flag=True,
    help="Scan every unusable image again. Images that could not be read are scanned again in any case.",
)
@click.option(
    "--leave-out-unreadable",
    is_flag=True,
    help="Build without the images that cannot be read, however many, as long as others can, and do not scan them again.",
)
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    required=True,
    metavar="NAME",
    help="Teacher to run; `radio-cache teachers` lists them. Repeatable.",
)
@click.option(
    "--weights",
    multiple=True,
    metavar="[NAME=]FILE",
    help="Local weights in the teacher's own format instead of a download.",
)
@click.option(
    "--size",
    multiple=True,
    metavar="[NAME=]PX",
    help="Side of the teacher's square input. Repeat it to keep a teacher at several sizes: the first is the teacher itself, "
    "each other one a level beside it, called NAME@PX. [default: the teacher's own]",
)
@click.option(
    "--fit",
    multiple=True,
    metavar="[NAME=]HOW",
    help="How images reach the teacher: squash, crop or pad. [default: the teacher's own]",
)
@click.option(
    "--features",
    multiple=True,
    metavar="[NAME=]WHICH",
    help="Map of SAM: neck (read by its mask decoder, 256 channels) or trunk (the wide map before the neck; the teacher is then "
    "called NAME-trunk). [default: neck]",
)
@click.option(
    "--views",
    multiple=True,
    metavar="[NAME=]K",
    help="Also run the teacher on K random crops of every image, and store the features of each. [default: 0]",
)
@click.option("--flip-views", is_flag=True, help="Mirror half of the --views, drawn at random and recorded.")
@click.option(
    "--out",
    required=True,
    type=PATH_OR_URL,
    metavar="CACHE.zarr",
    help="Cache to create, to continue, or to add teachers to: a folder, or a URL such as s3://bucket/cache.zarr.",
)
@click.option(
    "--codec",
    multiple=True,
    metavar="[NAME=]CODEC",
    help="Codec of the maps: klt (3 to 5 bits a value, calibrated to --fidelity), int8 (1 byte) or half (2 bytes). "
    "[default: klt; half where there are too few images to calibrate on]",
)
@click.option(
    "--fidelity",
    multiple=True,
    metavar="[NAME=]COSINE",
    help="Mean cosine of decoded and true tokens that klt keeps, such as 0.99 or 0.999. [default: 0.99]",
)
@click.option(
    "--step", multiple=True, metavar="[NAME=]STEP", help="Step of klt instead of a fidelity, in units of phi."
)
@click.option(
    "--packing",
    multiple=True,
    metavar="[NAME=]HOW",
    help="Packing of klt: packed (fixed width, read at the speed of the disk) or zstd (smallest, for buckets and archives). "
    "[default: packed]",
)
@click.option(
    "--store-pixels",
    type=int,
    metavar="PX",
    help="Store the images, too, shorter side at most PX pixels, so that training needs no other file. Teachers still run on "
    "the originals.",
)
@click.option(
    "--pixels-as",
    type=click.Choice(["jpeg", "webp-lossless"]),
    default="jpeg",
    show_default=True,
    metavar="HOW",
    help="How --store-pixels encodes: jpeg (of quality 90) or webp-lossless.",
)
@click.option(
    "--shard-images",
    type=int,
    metavar="N",
    help="Images in one shard, the unit of work and the most that a crash can cost. "
    f"[default: {BUILD_DEFAULTS['shard_images']}, or the number of an existing cache]",
)
@device_option()
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    metavar="TYPE",
    help="Precision of the forward pass: float32, bfloat16, float16; auto is bfloat16 on a GPU, float32 on a CPU.",
)
@click.option(
    "--batch-size",
    metavar="N|auto",
    help="Images in one forward pass. auto measures it for each teacher on a GPU, and is 4 on a CPU. A teacher that was begun "
    f"keeps its size. [default: {BATCH_IMAGES}]",
)
@click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="Compile teachers with torch.compile: minutes at first, then faster. Last bits differ (docs/build.md).",
)
@click.option("--threads", type=int, metavar="N", help="Threads that read and decode. [default: one per core]")
@click.option(
    "--workers", type=int, metavar="N", help="Build in N processes on this machine, one per GPU if there are any."
)
@click.option(
    "--scheduler", metavar="ADDRESS", help="Build on the workers of a Dask scheduler, such as tcp://10.0.0.1:8786."
)
@click.option(
    "--cluster",
    type=click.Path(path_type=Path),
    metavar="FILE.yaml",
    help="Request workers from Slurm or Kubernetes (docs/cluster.md).",
)
@click.option(
    "--log-json",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Append one JSON object a line, per shard and per teacher: images, bytes, seconds by stage (docs/build.md).",
)
@plain_errors(on_interrupt=SAME_COMMAND)
def build(
    device: str,
    threads: int | None,
    workers: int | None,
    scheduler: str | None,
    cluster: Path | None,
    **options: Any,
) -> None:
    """Run teachers over images and write their features to a Zarr cache.

    Killed at any moment and started again with the same command, it loses at most the shards in flight. Images that are broken
    are left out and named; they never stop a build. Where none can be read, or too many cannot, the build stops, and the same
    command continues. More teachers can be added to a cache later.
    """
    from cache_builder.build import build_cache
    from cache_builder.commands.build_options import build_config, on_device
    from cache_builder.pipeline.events import ReportedEvents
    from cache_builder.workers.allocator import keep_freed_memory
    from cache_builder.workers.cluster import workplace
    from radio_cache.checks.fidelity_loss import low_fidelity_shards

    # Before workers are awaited, because an error in the options must not surface hours later.
    config = build_config(threads=threads, **options)
    with workplace(
        workers=workers, scheduler=scheduler, cluster=cluster, device=device, threads=threads, on_message=print_line
    ) as place:
        config = on_device(config, place.device, threads=place.threads, dtype=options["dtype"])
        # Workers do it themselves, from the start of their processes.
        if place.worker_pool is None and config.device == "cpu":
            keep_freed_memory()
        where = (
            _device_name(config.device) if place.worker_pool is None else _pool_name(place.worker_pool, config.device)
        )
        click.echo(f"building {config.out} with {', '.join(options['teachers'])} on {where}", err=True)
        report = build_cache(config, ReportedEvents(print_line, log_json=config.log_json), place.worker_pool)

    console().print(_table(report))
    if report.unusable:
        click.echo(
            f"{report.unusable} of {report.cache.num_images} images could not be used: radio-cache info {config.out} --failures"
        )
    # After the table, where it is not scrolled away.
    for teacher_shards in low_fidelity_shards(report.cache):
        click.echo(f"\nwarning: {teacher_shards.describe(str(config.out))}")
    for line in conclusion(report, config.out):
        click.echo(line)
    if not report.is_complete:
        sys.exit(1)


def conclusion(report: "BuildReport", out: str | Path) -> list[str]:
    """Return the last lines of a build: whether the cache is complete, and the next command."""
    count = f"{report.unreadable} image{'s' * (report.unreadable > 1)}"
    if not report.is_complete:
        return [
            f"\n{out} is not complete: {count} could not be read. Make them readable, and the same command "
            "scans them again; --leave-out-unreadable builds without them."
        ]
    without = (
        f" but for {count} that could not be read, which the same command scans again" if report.unreadable else ""
    )
    return [
        f"\n{report.there.num_files} files of {report.there.num_shards} shards are there, in the sizes recorded; "
        "`radio-cache verify` reads them.",
        f"{out} is complete{without}. Next: radio-train --cache {out} --student e-radio-tiny --out run",
    ]


def _table(report: "BuildReport") -> Table:
    """Return a table with a line per teacher."""
    from radio_cache.view.info import cosine

    cache = report.cache
    num_usable = cache.num_images - report.unusable
    rows = table("", "teacher", "images", "made now", "images/s", "time", "codec", "cosine", "bytes/image", "stored")
    for result in report.results:
        teacher = cache.teachers[result.name]
        num_bytes = teacher.stored_bytes()
        rows.add_row(
            result.name,
            str(num_usable),
            str(result.images),
            f"{result.images / result.seconds:.1f}" if result.images else "-",
            human_seconds(result.seconds),
            teacher.spec.codec.label,
            cosine(teacher.fidelity()),
            human_bytes(num_bytes / max(1, num_usable)),
            human_bytes(num_bytes),
        )
    return rows


def human_seconds(seconds: float) -> str:
    """Return a duration for people: 1234 -> '20.6 min'."""
    # A unit begins at two of it: 1.5 h reads worse than 90 min.
    for unit, unit_s in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.1f} {unit}"
    return f"{seconds:.1f} s"


def _pool_name(worker_pool: "WorkerPool", device: str) -> str:
    return f"{worker_pool.num_workers} worker{'s' if worker_pool.num_workers > 1 else ''} ({device})"


def _device_name(device: str) -> str:
    import torch

    if device == "cpu":
        num_threads = torch.get_num_threads()
        return f"the CPU ({num_threads} thread{'s' * (num_threads > 1)})"
    return f"{device} ({torch.cuda.get_device_name(device)})"
