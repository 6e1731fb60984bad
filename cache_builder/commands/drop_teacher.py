"""`radio-cache drop-teacher`: remove one teacher from a cache."""

from pathlib import Path

import click

from cache_builder.commands.build import SAME_COMMAND
from radio_cache.reader import Cache
from radio_cache.terminal.output import PATH_OR_URL, human_bytes, plain_errors


@click.command("drop-teacher")
@click.argument("cache", type=PATH_OR_URL)
@click.argument("teacher")
@click.option("--yes", is_flag=True, help="Remove it without asking for confirmation.")
@plain_errors(on_interrupt=SAME_COMMAND)
def drop_teacher(cache: str | Path, teacher: str, yes: bool) -> None:
    """Remove TEACHER and all its files from CACHE. Other teachers do not change.

    CACHE is a folder such as cache.zarr, or a URL such as s3://bucket/cache.zarr.
    """
    from radio_cache.checks.verify import drop_teacher as drop_from_cache
    from radio_cache.checks.verify import teacher_bytes

    opened = Cache(cache)
    num_bytes = teacher_bytes(opened, teacher)
    # Nothing is lost with a teacher that has no files.
    if num_bytes and not yes:
        click.confirm(f"remove {teacher} ({human_bytes(num_bytes)}) from {cache}?", abort=True)
    click.echo(f"{teacher} was removed from {cache}: {human_bytes(drop_from_cache(opened, teacher))} freed")
