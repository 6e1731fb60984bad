"""`radio-cache align-error`: measure the error of training on crops of cached maps."""

from pathlib import Path

import click

from radio_cache.errors import ConfigError, unknown_name
from radio_cache.reader import Cache
from radio_cache.terminal.files import PICTURE_ENDINGS, OutputFile, write_output
from radio_cache.terminal.options import device_option
from radio_cache.terminal.output import PATH_OR_URL, allow_module_option, console, plain_errors, print_line, table


@click.command("align-error")
@click.argument("cache", type=PATH_OR_URL, metavar="CACHE")
@click.option(
    "--teacher", "teachers", multiple=True, metavar="NAME", help="Measure only this teacher. Repeatable. [default: all]"
)
@click.option(
    "--limit",
    default=64,
    show_default=True,
    metavar="N",
    help="Measure on N images drawn at random, with one crop per image and scale.",
)
@click.option(
    "--scales",
    default="1,0.9,0.7,0.5,0.35",
    show_default=True,
    metavar="SHARES",
    help="Sides of the crops as shares of the image's sides, separated by commas.",
)
@click.option("--seed", default=0, show_default=True, metavar="N", help="Seed of the images and crops drawn.")
@click.option(
    "--json",
    "json_file",
    type=OutputFile(),
    metavar="FILE",
    help="Also write the figures to this file as JSON; - is standard output.",
)
@click.option(
    "--plot",
    type=OutputFile(*PICTURE_ENDINGS, ".svg", ".pdf"),
    metavar="FILE",
    help="Draw the figures to this PNG, JPEG, SVG or PDF file. Needs matplotlib.",
)
@device_option()
@allow_module_option
@plain_errors(on_interrupt="Nothing was written.")
def align_error(
    cache: str | Path,
    teachers: tuple[str, ...],
    limit: int,
    scales: str,
    seed: int,
    json_file: Path | None,
    plot: Path | None,
    device: str,
) -> None:
    """Measure the error of training on crops of cached maps instead of running the teachers on the crops.

    Prints the mean cosine similarity of both maps' tokens, after the teacher's mean token is subtracted: 1 means no error.
    Teachers run at the first of their cached sizes. Each size in the cache is compared, also for mirrored crops and maps.

    CACHE is a folder such as cache.zarr, or a URL such as s3://bucket/cache.zarr.
    """
    import json

    from cache_builder.checks.align_error import AlignRequest, measure, save_plot
    from radio_cache.torch import pick_device

    opened = Cache(cache)
    for name in teachers:
        if name not in opened.teachers.names():
            raise ConfigError(f"{opened.url}: " + unknown_name("cached teacher", name, opened.teachers.names()))
    # Before the teachers load, which takes longer than to notice a typing error.
    try:
        sides = tuple(float(text) for text in scales.split(","))
    except ValueError as exc:
        raise ConfigError(f"--scales {scales}: numbers with commas between them, such as 1,0.7,0.5") from exc
    request = AlignRequest(teachers=teachers, limit=limit, scales=sides, seed=seed, device=pick_device(device))
    # Teachers need the original images, which may have to be downloaded: the note explains the wait.
    if note := opened.remote_images_note():
        print_line(note)
    errors = measure(opened, request, on_message=print_line)
    rows = table("centred cosine by side of the crop", "teacher", "level", "", *(f"{side:g}" for side in sides), left=3)
    # One row per teacher, level and mirroring, in the order of the measurement.
    for key in dict.fromkeys((e.teacher, e.level_px, e.mirrored) for e in errors):
        cells = [
            e.cosine for side in sides for e in errors if (e.teacher, e.level_px, e.mirrored, e.scale) == (*key, side)
        ]
        rows.add_row(key[0], f"{key[1]} px", "mirrored" if key[2] else "", *(f"{cosine:.3f}" for cosine in cells))
    console().print(rows)
    if json_file:
        write_output(json_file, json.dumps([error.to_json() for error in errors], indent=1).encode())
    if plot:
        save_plot(errors, str(plot))
