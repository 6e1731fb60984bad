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
    metavar="PATH_OR_URL",
    help="New location of the images, in any form that `radio-cache build --images` takes. Repeatable, in the order of the "
    "build.",
)
@plain_errors(on_interrupt="Nothing was changed.")
def relocate(cache: str | Path, images: tuple[str, ...]) -> None:
    """Record the new location of moved images in CACHE, after comparing a sample of them with the recorded digests.

    CACHE is a folder such as cache.zarr, or a URL such as s3://bucket/cache.zarr.
    """
    from cache_builder.relocate import relocate as relocate_cache

    relocated = relocate_cache(Cache(cache), images)
    print_line(f"{cache}: its images are in {relocated.meta.containers[0].path} now")
