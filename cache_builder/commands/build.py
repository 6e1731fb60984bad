"""`radio-cache build`: run teachers over images and write their features to a cache."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from cache_builder.build_config import BATCH_IMAGES, BUILD_DEFAULTS
from radio_cache.terminal.help import SectionedCommand
from radio_cache.terminal.options import device_option, renamed_option
from radio_cache.terminal.output import PATH_OR_URL, console, human_bytes, plain_errors, print_line, table

if TYPE_CHECKING:
    from cache_builder.build import BuildReport
    from cache_builder.workers.pool import WorkerPool

SAME_COMMAND = "Nothing is lost: the same command continues where this one stopped."
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
        "pixel_format",
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
    metavar="PATH_OR_URL",
    help="Images to cache: a folder (its subfolders are the classes), a WebDataset tar, a folder of tars, a pattern such as "
    "'train-{000..004}.tar', a Parquet file with image bytes, or a text file with one path or URL per line. URLs start with "
    "s3://, gs://, https:// or hf:// (docs/sources.md). Repeatable.",
)
@click.option(
    "--member",
    default=BUILD_DEFAULTS["member"],
    metavar="ENDINGS",
    help="File ending of the images to use in tars whose samples have several files, such as 'jpg'. With 'jpg;png', the "
    "first ending that a sample has is used. [default: every image file]",
)
@click.option(
    "--filter",
    "filters",
    multiple=True,
    metavar="GLOB",
    help="Use only images whose key (path below --images) matches, such as 'cat/*'. '!cat/*' excludes them. Repeatable.",
)
@click.option(
    "--limit",
    type=int,
    metavar="N",
    help="Use only the first N images, counted after --filter and --shuffle-seed. [default: all]",
)
@click.option(
    "--shuffle-seed",
    type=int,
    metavar="N",
    help="Shuffle the images with this seed. Without it they keep the order of the source, in which folders are sorted by "
    "class, so that --limit and each shard cover few classes. [default: no shuffling]",
)
@click.option(
    "--max-pixels",
    type=int,
    metavar="N",
    help="Reject images with more pixels than N before decoding them. "
    f"[default: {BUILD_DEFAULTS['max_pixels'] / 1e6:.0f} million, or the limit of an existing cache]",
)
@click.option("--rescan", is_flag=True, help="List and scan --images again, even if they seem unchanged.")
@click.option(
    "--retry-unusable",
    is_flag=True,
    help="Scan damaged and rejected images again. Images that could not be read are always scanned again.",
)
@click.option(
    "--leave-out-unreadable",
    is_flag=True,
    help="Build without the images that cannot be read, however many they are, and do not scan them again.",
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
    help="Load weights from this local file, in the format in which they are published, instead of downloading them. "
    "Here and below, NAME= selects one of several teachers.",
)
@click.option(
    "--size",
    multiple=True,
    metavar="[NAME=]PX",
    help="Side of the teacher's square input in pixels. Repeat it to cache a teacher at several sizes: the first is stored "
    "as NAME, each further one as NAME@PX. [default: the teacher's own size]",
)
@click.option(
    "--fit",
    multiple=True,
    metavar="[NAME=]FIT",
    help="How an image is fitted to the teacher's square input: squash (ignores the aspect ratio), crop (centre crop) or pad. "
    "[default: the teacher's own]",
)
@click.option(
    "--features",
    multiple=True,
    metavar="[NAME=]MAP",
    help="Feature map of SAM to cache: neck (256 channels, the input of its mask decoder) or trunk (the wider map before the "
    "neck, stored as NAME-trunk). [default: neck]",
)
@click.option(
    "--views",
    multiple=True,
    metavar="[NAME=]N",
    help="Also run the teacher on N random crops of every image and cache their features. [default: 0]",
)
@click.option("--flip-views", is_flag=True, help="Mirror a random half of the --views; the cache records which.")
@click.option(
    "--out",
    required=True,
    type=PATH_OR_URL,
    metavar="PATH_OR_URL",
    help="Cache to create, to continue, or to add teachers to: a folder such as cache.zarr, or a URL such as "
    "s3://bucket/cache.zarr.",
)
@click.option(
    "--codec",
    multiple=True,
    metavar="[NAME=]CODEC",
    help="Compression of the feature maps: klt (3 to 5 bits per value, calibrated to --fidelity), int8 (1 byte) or half "
    "(2 bytes). [default: klt, or half if there are too few images to calibrate on]",
)
@click.option(
    "--fidelity",
    multiple=True,
    metavar="[NAME=]COSINE",
    help="Mean cosine similarity of decoded to original tokens that klt is calibrated to, below 1. [default: 0.99]",
)
@click.option(
    "--step",
    multiple=True,
    metavar="[NAME=]STEP",
    help="Quantiser step of klt, set directly instead of by --fidelity, in units of phi, the root mean square standard "
    "deviation of the channels (docs/format.md).",
)
@click.option(
    "--packing",
    multiple=True,
    metavar="[NAME=]PACKING",
    help="How klt stores its values: packed (fixed width, fastest to read), zstd (a quarter smaller) or ans "
    "(entropy coded, half the size; decoded on the CPU; for buckets and archives). "
    "[default: packed]",
)
@click.option(
    "--store-pixels",
    type=int,
    metavar="PX",
    help="Also store the images, resized to a shorter side of at most PX pixels, so that training needs no other files. "
    "Teachers still see the originals. [default: images are not stored]",
)
@click.option(
    "--pixel-format",
    type=click.Choice(["jpeg", "webp-lossless"]),
    default="jpeg",
    show_default=True,
    metavar="FORMAT",
    help="Image format of --store-pixels: jpeg (quality 90) or webp-lossless.",
)
@renamed_option("--pixels-as", "--pixel-format")
@click.option(
    "--shard-images",
    type=int,
    metavar="N",
    help="Images per shard. A shard is written as a whole: a crash loses at most the shards in progress. "
    f"[default: {BUILD_DEFAULTS['shard_images']}, or that of an existing cache]",
)
@device_option()
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    metavar="TYPE",
    help="Precision of the teachers: float32, bfloat16 or float16; auto is bfloat16 on a GPU and float32 on a CPU.",
)
@click.option(
    "--batch-size",
    metavar="N|auto",
    help="Images per forward pass. auto measures the best size of each teacher on a GPU, and is 4 on a CPU. A teacher that "
    f"the cache holds in part keeps its batch size. [default: {BATCH_IMAGES}]",
)
@click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="Compile teachers with torch.compile: starts minutes later, then runs faster. Features differ in their last bits "
    "(docs/build.md).",
)
@click.option("--threads", type=int, metavar="N", help="Threads that read and decode images. [default: one per core]")
@click.option(
    "--workers",
    type=int,
    metavar="N",
    help="Build in N processes on this machine, each with its own GPU if there are any. [default: this process]",
)
@click.option(
    "--scheduler", metavar="ADDRESS", help="Build on the workers of this Dask scheduler, such as tcp://10.0.0.1:8786."
)
@click.option(
    "--cluster",
    type=click.Path(path_type=Path),
    metavar="FILE.yaml",
    help="Request workers from Slurm or Kubernetes as this file describes (docs/cluster.md).",
)
@click.option(
    "--log-json",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Append a log to this file, one JSON object per line for each shard and teacher: images, bytes, and seconds by "
    "stage (docs/build.md).",
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

    A build can be stopped at any time: the same command continues it and repeats at most the shards in progress. Damaged
    images are skipped and listed. If too many images cannot be read, the build stops; once they can, the same command
    continues. Teachers can be added to a cache later.
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
    # Scripts that train after a build must not take an incomplete cache for a finished one.
    if not report.is_complete:
        sys.exit(1)


def conclusion(report: "BuildReport", out: str | Path) -> list[str]:
    """Return the last lines of a build: whether the cache is complete, and the next command."""
    count = f"{report.unreadable} image{'s' * (report.unreadable > 1)}"
    # Unreadable is not damaged: a share that is not mounted must not shrink the cache for good.
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
        # Counted from the files rather than from this run, which may have continued an earlier one.
        num_bytes = teacher.stored_bytes()
        rows.add_row(
            result.name,
            str(num_usable),
            str(result.images),
            f"{result.images / result.seconds:.1f}" if result.images else "-",
            human_seconds(result.seconds),
            teacher.spec.codec.label,
            cosine(teacher.fidelity()),
            # All images of a cache may be unusable.
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
