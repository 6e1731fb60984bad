"""`radio-cache`: build a cache, see what is in it, try the whole idea."""

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from cache_builder.build_config import BATCH_IMAGES
from cache_builder.commands.align_error import align_error
from cache_builder.commands.copy import copy
from cache_builder.commands.plan import human_seconds, plan_command
from cache_builder.commands.verify import repair, verify
from cache_builder.commands.view import view
from radio_cache import __version__
from radio_cache.images.decode import MAX_PIXELS
from radio_cache.reader import Cache
from radio_cache.terminal.help import HELP_SETTINGS, OrderedGroup, SectionedCommand
from radio_cache.terminal.options import device_option
from radio_cache.terminal.output import PLACE, console, human_bytes, plain_errors, printable_lines, say, table

if TYPE_CHECKING:
    from cache_builder.build import BuildReport
    from cache_builder.workers.pool import WorkerPool

_SAME_COMMAND = "Nothing is lost: the same command goes on where this one stopped."


@click.group(
    cls=OrderedGroup,
    order=("demo", "teachers", "plan", "build", "info", "view", "verify", "repair", "copy", "relocate", "drop-teacher"),
    context_settings=HELP_SETTINGS,
)
@click.version_option(__version__, prog_name="radio-cache")
def main() -> None:
    """Run big vision teachers once over your images, and keep what they say.

    \b
    See it work first, offline, in a few minutes:
        radio-cache demo
    Then your own:
        radio-cache build --images photos/ --teacher efficientnet-lite0 --out c.zarr
        radio-train --cache c.zarr --student e-radio-tiny --out run
        radio-eval all --run run
        radio-export --run run --out student
    """


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
    "The cache, and what is kept": (
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
    "Many processes and machines": ("workers", "scheduler", "cluster"),
}
"""Headings of the help, and the options below each."""

BUILD_EXAMPLES = (
    "radio-cache build --images photos/ --teacher efficientnet-lite0 --out c.zarr",
    "radio-cache build --images 'train-{000..999}.tar' --out c.zarr \\",
    "    --teacher clip --teacher dinov2 --teacher sam --fidelity sam=0.999",
    "radio-cache build ... --size 224 --size 448    # every teacher at two sizes",
    "radio-cache build ... --store-pixels 512       # training needs no other file",
)


@main.command(cls=SectionedCommand, sections=BUILD_SECTIONS, examples=BUILD_EXAMPLES)
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
    default="",
    metavar="ENDINGS",
    help="Which member of a sample in a tar is the photo, such as 'jpg;png': the first of these endings that the sample has. "
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
    help="Order the images at random, as the seed has it. Folders come sorted by class: without it the first N are of a few "
    "classes, and so is every shard.",
)
@click.option(
    "--max-pixels",
    type=int,
    metavar="N",
    help=f"Refuse larger images before decoding them. [default: {MAX_PIXELS / 1e6:.0f} million, or what a cache that is there "
    "has]",
)
@click.option("--rescan", is_flag=True, help="List the sources again, even if nothing seems to have changed.")
@click.option(
    "--retry-unusable",
    is_flag=True,
    help="Look again at every image that could not be used. Those that could not be read are looked at again without it.",
)
@click.option(
    "--leave-out-unreadable",
    is_flag=True,
    help="Build without the images that cannot be read, however many, as long as others can; and do not look at them again.",
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
    help="Of SAM: neck (what its mask decoder reads, 256 channels) or trunk (the wide map before the neck; the teacher is then "
    "called NAME-trunk). [default: neck]",
)
@click.option(
    "--views",
    multiple=True,
    metavar="[NAME=]K",
    help="Also show the teacher K random crops of every image, and keep what it says of each. [default: 0]",
)
@click.option("--flip-views", is_flag=True, help="Mirror half of the --views, drawn at random and recorded.")
@click.option(
    "--out",
    required=True,
    type=PLACE,
    metavar="CACHE.zarr",
    help="The cache to make, to go on with, or to add teachers to: a folder, or a URL such as s3://bucket/cache.zarr.",
)
@click.option(
    "--codec",
    multiple=True,
    metavar="[NAME=]CODEC",
    help="How maps are stored: klt (3 to 5 bits a value, calibrated to --fidelity), int8 (1 byte) or half (2 bytes). "
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
    help="Of klt: packed (fixed width, read at the speed of the disk) or zstd (smallest, for buckets and archives). "
    "[default: packed]",
)
@click.option(
    "--store-pixels",
    type=int,
    metavar="PX",
    help="Keep the images, too, shorter side at most PX pixels, so that training needs no other file. Teachers see the "
    "originals all the same.",
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
    help="Images in one shard: the unit of work, and what a crash can cost. [default: 128, or what a cache that is there has]",
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
    help="Images in one forward pass; auto finds it for each teacher on a GPU, and is 4 on a CPU. A teacher goes on with the "
    f"size it was begun with. [default: {BATCH_IMAGES}]",
)
@click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="Translate teachers with torch.compile: minutes at first, then faster; last bits differ (docs/build.md).",
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
    help="Ask Slurm or Kubernetes for workers (docs/cluster.md).",
)
@click.option(
    "--log-json",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Append one JSON object a line, per shard and per teacher: images, bytes, seconds by stage (docs/build.md).",
)
@plain_errors(on_interrupt=_SAME_COMMAND)
def build(
    out: str | Path,
    teachers: tuple[str, ...],
    device: str,
    threads: int | None,
    workers: int | None,
    scheduler: str | None,
    cluster: Path | None,
    **options: Any,
) -> None:
    """Run teachers over images and write their features to a Zarr cache.

    Killed at any moment, started again with the same command, it loses at most the shards in flight. Images that are broken
    are left out and named; they never stop a build. Where none can be read, or too many cannot, the build stops, and the same
    command goes on. More teachers can be added to a cache later.
    """
    from cache_builder.build import build_cache
    from cache_builder.commands.build_options import build_config
    from cache_builder.pipeline.events import ReportedEvents
    from cache_builder.workers.allocator import keep_freed_memory
    from cache_builder.workers.cluster import workplace
    from radio_cache.checks.fidelity_loss import drifts

    options |= {"out": out, "teachers": teachers}
    build_config(**options, device="cpu", threads=threads)  # errors, before anybody waits
    with workplace(
        workers=workers, scheduler=scheduler, cluster=cluster, device=device, threads=threads, say=say
    ) as place:
        config = build_config(
            **options, device=place.device, threads=place.threads, elsewhere=place.worker_pool is not None
        )
        if place.worker_pool is None and config.device == "cpu":
            keep_freed_memory()
        click.echo(
            f"building {out} with {', '.join(teachers)} on {_workers_name(place.worker_pool, config.device)}", err=True
        )
        report = build_cache(config, ReportedEvents(say, log_json=config.log_json), place.worker_pool)

    console().print(_build_table(report))
    if report.unusable:
        click.echo(
            f"{report.unusable} of {report.cache.num_images} images could not be used: radio-cache info {out} --failures"
        )
    for drift in drifts(report.cache):
        click.echo(f"\nwarning: {drift.describe(str(out))}")
    count = f"{report.unreadable} image{'s' * (report.unreadable > 1)}"
    without = (
        f" but for {count} that could not be read, which the same command looks at again" if report.unreadable else ""
    )
    if not report.is_complete:
        click.echo(
            f"\n{out} is not complete: {count} could not be read. Make them readable, and the same command "
            "looks at them again; --leave-out-unreadable builds without them."
        )
        sys.exit(1)
    click.echo(
        f"\n{report.there.num_files} files of {report.there.num_shards} shards are there, in the sizes recorded; "
        f"`radio-cache verify` reads them.\n{out} is complete{without}. "
        f"Next: radio-train --cache {out} --student e-radio-tiny --out run"
    )


main.add_command(plan_command(build, BUILD_SECTIONS))


def _build_table(report: "BuildReport") -> Table:
    """What a build did: a line a teacher."""
    from radio_cache.view.info import cosine

    cache = report.cache
    usable = cache.num_images - report.unusable
    rows = table("", "teacher", "images", "made now", "images/s", "time", "codec", "cosine", "bytes/image", "stored")
    for result in report.results:
        teacher = cache.teachers[result.name]
        stored = teacher.stored_bytes()
        rate = f"{result.images / result.seconds:.1f}" if result.images else "-"
        rows.add_row(
            result.name,
            str(usable),
            str(result.images),
            rate,
            human_seconds(result.seconds),
            teacher.spec.codec.label,
            cosine(teacher.fidelity()),
            human_bytes(stored / max(1, usable)),
            human_bytes(stored),
        )
    return rows


@main.command()
@click.argument("cache", type=PLACE)
@click.option("--failures", is_flag=True, help="List the images that cannot be used, and why.")
@click.option("--commands", is_flag=True, help="Print the commands that build this cache again, instead.")
@plain_errors(on_interrupt="")
def info(cache: str | Path, failures: bool, commands: bool) -> None:
    """Say what is in CACHE: teachers, sizes, bytes per image, how complete it is."""
    from radio_cache.view.info import describe, describe_failures

    opened = Cache(cache)
    if commands:
        from cache_builder.build_command import build_commands

        opened.teachers.refuse_unreadable()
        for command in build_commands(opened):
            click.echo(shlex.join(command))
        return
    console().print(describe_failures(opened) if failures else describe(opened))


main.add_command(view)
main.add_command(verify)
main.add_command(repair)


@main.command()
@click.argument("cache", type=PLACE)
@click.option(
    "--images",
    multiple=True,
    required=True,
    metavar="SOURCE",
    help="Where the images are now, as `radio-cache build --images` takes it. Repeatable, in the order of the build.",
)
@plain_errors(on_interrupt="Nothing was changed.")
def relocate(cache: str | Path, images: tuple[str, ...]) -> None:
    """Tell CACHE where its images were moved to. A sample of them is compared with the recorded digests first."""
    from cache_builder.relocate import relocate as relocate_cache

    opened = Cache(cache)
    moved = relocate_cache(opened, images)
    say(f"{cache}: its images are in {moved.meta.containers[0].path} now")


@main.command("drop-teacher")
@click.argument("cache", type=PLACE)
@click.argument("teacher")
@click.option("--yes", is_flag=True, help="Do not ask.")
@plain_errors(on_interrupt=_SAME_COMMAND)
def drop(cache: str | Path, teacher: str, yes: bool) -> None:
    """Remove one TEACHER and all it wrote from CACHE. The others stay as they are."""
    from radio_cache.checks.verify import drop_teacher, teacher_bytes

    opened = Cache(cache)
    stored = teacher_bytes(opened, teacher)
    if stored and not yes:
        click.confirm(f"remove {teacher} ({human_bytes(stored)}) from {cache}?", abort=True)
    click.echo(f"{teacher} is gone from {cache}: {human_bytes(drop_teacher(opened, teacher))} freed")


main.add_command(copy)
main.add_command(align_error)


@main.command()
@click.option(
    "--json",
    "as_json",
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="Write the same as JSON, to FILE or to standard output, instead of tables.",
)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@plain_errors(on_interrupt="")
def teachers(names: tuple[str, ...], as_json: str | None) -> None:
    """List the teachers that have a name: sizes, bytes an image, licences, and where their weights come from.

    NAME: teachers of any library (timm:MODEL, open_clip:MODEL/WEIGHTS) to list instead: input, how much of a photo each sees,
    licence.
    """
    from cache_builder.commands.teachers import named_table, photo_shares, size_table, teachers_json, weights_table

    if names:
        if as_json is not None:
            raise click.UsageError("--json lists the teachers that have a name: leave out the NAMEs")
        from cache_builder.teachers import find_teacher

        console().print(named_table([find_teacher(name) for name in names]))
        return
    if as_json is not None:
        with click.open_file(as_json, "w") as file:
            file.write(json.dumps(teachers_json(), indent=1) + "\n")
        return
    console().print(size_table())
    click.echo(f"\n{photo_shares()}")
    click.echo(
        "\nAt each teacher's own size; klt at --fidelity 0.99, an estimate: `radio-cache plan` measures yours.\n"
    )
    console().print(weights_table())
    click.echo(
        "\nNames with a slash are repositories on huggingface.co. Any model of timm and open_clip is a teacher too:\n"
        "timm:MODEL, open_clip:MODEL/WEIGHTS. What the features are, own checkpoints, licences: docs/teachers.md.\n"
        "Without a network: fetch the file elsewhere and pass it with `radio-cache build --weights FILE`."
    )


@main.command()
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Your own photos instead of the bundled ones: a folder of two or more.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo-out"),
    show_default=True,
    metavar="DIR",
    help="Where everything goes.",
)
@plain_errors(on_interrupt=_SAME_COMMAND)
def demo(images: Path | None, out: Path) -> None:
    """See the whole idea work, offline, in a few minutes on two CPU cores.

    Cuts photographs into crops, runs three ImageNet-trained teachers over them once, trains a small student from the
    cache alone, compares all of them by k-NN, and writes one HTML page with the table, the losses and pictures.
    """
    from cache_builder.demo.run import DemoConfig, run_demo

    report = run_demo(DemoConfig(out=out, images=images), say=lambda text: click.echo(printable_lines(text)))
    spent = ", ".join(f"{title} {seconds:.0f} s" for title, seconds in report.seconds.items())
    click.echo(f"\n{spent}.\n\nOpen {report.page.resolve()}: losses, and what teacher, cache and student see.")
    if images is None:
        here = "radio-cache" if shutil.which("radio-cache") else sys.argv[0]  # `make demo` leaves .venv inactive
        click.echo(f"Next, on your own photos: {here} demo --images DIR --out my-demo")


def _workers_name(worker_pool: "WorkerPool | None", device: str) -> str:
    if worker_pool is None:
        return _device_name(device)
    return f"{worker_pool.num_workers} worker{'s' if worker_pool.num_workers > 1 else ''} ({device})"


def _device_name(device: object) -> str:
    import torch

    if str(device) == "cpu":
        threads = torch.get_num_threads()
        return f"the CPU ({threads} thread{'s' * (threads > 1)})"
    return f"{device} ({torch.cuda.get_device_name(str(device))})"


if __name__ == "__main__":
    main()
