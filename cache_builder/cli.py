"""`radio-cache`: the group of all subcommands."""

import click

from cache_builder.commands.align_error import align_error
from cache_builder.commands.build import BUILD_SECTIONS, build
from cache_builder.commands.copy import copy
from cache_builder.commands.demo import demo
from cache_builder.commands.drop_teacher import drop_teacher
from cache_builder.commands.info import info
from cache_builder.commands.plan import plan_command
from cache_builder.commands.relocate import relocate
from cache_builder.commands.teachers import teachers
from cache_builder.commands.verify import repair, verify
from cache_builder.commands.view import view
from radio_cache import __version__
from radio_cache.terminal.help import HELP_SETTINGS, OrderedGroup

# No docstring: click reads \b as a character, which keeps the lines of the paragraph as they are.
_HELP = """Run vision teachers once over your images and cache their features.

\b
Try it on bundled photos, offline, in a few minutes:
    radio-cache demo
With your own photos:
    radio-cache build --images photos/ --teacher efficientnet-lite0 --out c.zarr
    radio-train --cache c.zarr --student e-radio-tiny --out run
    radio-eval all --run run
    radio-export --run run --out student
"""


@click.group(
    cls=OrderedGroup,
    order=("demo", "teachers", "plan", "build", "info", "view", "verify", "repair", "copy", "relocate", "drop-teacher"),
    context_settings=HELP_SETTINGS,
    help=_HELP,
)
@click.version_option(__version__, prog_name="radio-cache")
def main() -> None:
    """Group the commands of `radio-cache`."""


for command in (
    align_error,
    build,
    copy,
    demo,
    drop_teacher,
    info,
    plan_command(build, BUILD_SECTIONS),
    relocate,
    repair,
    teachers,
    verify,
    view,
):
    main.add_command(command)


if __name__ == "__main__":
    main()
