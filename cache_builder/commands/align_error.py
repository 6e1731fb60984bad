"""`radio-cache align-error`: measure the error of training on crops of cached maps."""

from pathlib import Path

import click

from radio_cache.errors import ConfigError, unknown_name
from radio_cache.reader import Cache
from radio_cache.terminal.files import PICTURE_ENDINGS, OutputFile, write_output
from radio_cache.terminal.options import device_option
from radio_cache.terminal.output import PATH_OR_URL, allow_module_option, console, plain_errors, print_line, table


@click.command("align-error")
@click.argument("cache", type=PATH_OR_URL, metavar="CACHE.zarr")
@click.option(
    "--teacher", "teachers", multiple=True, metavar="NAME", help="This teacher only. Repeatable. [default: all]"
)
@click.option(
    "--limit", default=64, show_default=True, help="Images of the cache, a seeded sample; a crop each and scale."
)
@click.option(
    "--scales", default="1,0.9,0.7,0.5,0.35", show_default=True, help="Sides of the crops, shares of the image."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_file", type=OutputFile(), metavar="FILE", help="Write the figures, too.")
@click.option(
    "--plot", type=OutputFile(*PICTURE_ENDINGS, ".svg", ".pdf"), metavar="FILE.png", help="Draw them; needs matplotlib."
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
    """Compare crops of cached maps with the teachers' own maps of the crops.

    Cosine of tokens less the teacher's mean token: 1 is the same. Teachers run at their first size; each of their levels in
    the cache is compared with them, and so are mirrored crops with mirrored maps.
    """
    import json

    from cache_builder.checks.align_error import AlignRequest, measure, save_plot
    from radio_cache.torch import pick_device

    opened = Cache(cache)
    for name in teachers:
        if name not in opened.teachers.names():
            raise ConfigError(f"{opened.url}: " + unknown_name("cached teacher", name, opened.teachers.names()))
    try:
        sides = tuple(float(text) for text in scales.split(","))
    except ValueError as exc:
        raise ConfigError(f"--scales {scales}: numbers with commas between them, such as 1,0.7,0.5") from exc
    request = AlignRequest(teachers=teachers, limit=limit, scales=sides, seed=seed, device=pick_device(device))
    if note := opened.remote_images_note():
        print_line(note)
    errors = measure(opened, request, on_message=print_line)
    rows = table("centred cosine by side of the crop", "teacher", "level", "", *(f"{side:g}" for side in sides), left=3)
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
