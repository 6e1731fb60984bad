"""`radio-cache info`: print the contents of a cache, or the commands that build it again."""

import shlex
from pathlib import Path

import click

from radio_cache.reader import Cache
from radio_cache.terminal.output import PATH_OR_URL, console, plain_errors


@click.command()
@click.argument("cache", type=PATH_OR_URL)
@click.option(
    "--failures", is_flag=True, help="List the images that cannot be used, with the reason, instead of the teachers."
)
@click.option("--commands", is_flag=True, help="Print the commands that rebuild this cache, instead of the teachers.")
@plain_errors(on_interrupt="")
def info(cache: str | Path, failures: bool, commands: bool) -> None:
    """Print the contents of CACHE: images, teachers, feature sizes, bytes per image, and whether it is complete.

    CACHE is a folder such as cache.zarr, or a URL such as s3://bucket/cache.zarr.
    """
    from radio_cache.view.info import describe, describe_failures

    opened = Cache(cache)
    if commands:
        from cache_builder.build_command import build_commands

        # A command without one of the teachers would not build the same cache.
        opened.teachers.refuse_unreadable()
        # Several, if teachers ran in different precisions or batch sizes, which are options of a whole build.
        for command in build_commands(opened):
            click.echo(shlex.join(command))
        return
    console().print(describe_failures(opened) if failures else describe(opened))
