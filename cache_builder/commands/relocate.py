"""`radio-cache relocate`: record where the images of a cache are now."""

from pathlib import Path

import click

from radio_cache.reader import Cache
from radio_cache.terminal.output import PATH_OR_URL, plain_errors, print_line


@click.command()
@click.argument("cache", type=PATH_OR_URL)
@click.option(
    "--images",
    multiple=True,
    required=True,
    metavar="SOURCE",
    help="Where the images are now, as `radio-cache build --images` takes it. Repeatable, in the order of the build.",
)
@plain_errors(on_interrupt="Nothing was changed.")
def relocate(cache: str | Path, images: tuple[str, ...]) -> None:
    """Record in CACHE where its images were moved to. A sample of them is compared with the recorded digests first."""
    from cache_builder.relocate import relocate as relocate_cache

    relocated = relocate_cache(Cache(cache), images)
    print_line(f"{cache}: its images are in {relocated.meta.containers[0].path} now")
