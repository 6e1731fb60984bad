"""`radio-cache view`: draw images of a cache beside their feature maps."""

from pathlib import Path

import click

from radio_cache.errors import ConfigError, unknown_name
from radio_cache.reader import Cache
from radio_cache.terminal.files import PICTURE_ENDINGS, OutputFile, save_picture
from radio_cache.terminal.options import renamed_option
from radio_cache.terminal.output import PATH_OR_URL, plain_errors


@click.command()
@click.argument("cache", type=PATH_OR_URL)
@click.option(
    "--out",
    type=OutputFile(*PICTURE_ENDINGS),
    metavar="FILE",
    help="PNG or JPEG file to write. [default: NAME-view.png in the current folder, for NAME.zarr]",
)
@click.option(
    "--num-images",
    "count",
    type=click.IntRange(1, 100),
    default=6,
    show_default=True,
    metavar="N",
    help="Number of images to draw.",
)
@renamed_option("--images", "--num-images")
@click.option(
    "--teacher", "teachers", multiple=True, metavar="NAME", help="Draw only this teacher. Repeatable. [default: all]"
)
@click.option("--seed", default=0, show_default=True, metavar="N", help="Seed of the random choice of images.")
@plain_errors(on_interrupt="")
def view(cache: str | Path, out: Path | None, count: int, teachers: tuple[str, ...], seed: int) -> None:
    """Draw images of CACHE beside their cached feature maps, decoded from the cache. No teacher runs.

    Colours are the three principal components of a teacher's features: similar colours mean similar features.

    CACHE is a folder such as cache.zarr, or a URL such as s3://bucket/cache.zarr.
    """
    from radio_cache.view.cache_pictures import cache_pictures
    from radio_cache.view.picture_grid import picture_grid

    # In the current folder, because the cache may be read-only or a URL.
    out = out or Path(f"{Path(str(cache)).stem}-view.png")
    opened = Cache(cache)
    names = teachers or tuple(opened.teachers)
    if not names:
        raise ConfigError(f"{opened.url} has no teacher yet: radio-cache build --teacher NAME ... --out {opened.url}")
    for name in names:
        if name not in opened.teachers:
            raise ConfigError(f"{opened.url}: " + unknown_name("cached teacher", name, opened.teachers))
    # Stored pixels need no source; without them the drawn images are read from where they are.
    if note := opened.remote_images_note():
        click.echo(note, err=True)
    rows = cache_pictures(opened, names, count=count, seed=seed)
    save_picture(out, picture_grid(rows))
    click.echo(f"{out}: {len(rows)} images, {', '.join(names)}")
