"""`radio-cache view`: draw images of a cache beside their feature maps."""

from pathlib import Path

import click

from radio_cache.errors import ConfigError, unknown_name
from radio_cache.reader import Cache
from radio_cache.terminal.files import PICTURE_ENDINGS, OutputFile, save_picture
from radio_cache.terminal.output import PATH_OR_URL, plain_errors


@click.command()
@click.argument("cache", type=PATH_OR_URL)
@click.option(
    "--out",
    type=OutputFile(*PICTURE_ENDINGS),
    metavar="FILE",
    help="PNG or JPEG to write. [default: the cache's name with -view.png, here]",
)
@click.option(
    "--images",
    "count",
    type=click.IntRange(1, 100),
    default=6,
    show_default=True,
    metavar="N",
    help="How many to show.",
)
@click.option("--teacher", "teachers", multiple=True, metavar="NAME", help="Show only this teacher. Repeatable.")
@click.option("--seed", default=0, show_default=True, metavar="N", help="Which images are drawn.")
@plain_errors(on_interrupt="")
def view(cache: str | Path, out: Path | None, count: int, teachers: tuple[str, ...], seed: int) -> None:
    """Draw images of CACHE beside their teachers' feature maps, as the cache keeps them. No teacher is run.

    Colours are the three strongest directions of what is shown of a teacher: equal colours are equal features.
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
    if note := opened.remote_images_note():
        click.echo(note, err=True)
    rows = cache_pictures(opened, names, count=count, seed=seed)
    save_picture(out, picture_grid(rows))
    click.echo(f"{out}: {len(rows)} images, {', '.join(names)}")
