"""Command classes of all four programs: help under headings, examples at the end, and no option given twice."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import click

from radio_cache.terminal.options import with_current_names

HELP_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
"""Context settings of every command: -h as well as --help, and help as wide as the terminal up to 100 columns."""

_MAX_NAME_COLUMNS = 24
"""Longer names of options put their help on the next line."""


_QUOTES = "if the shell expanded a pattern, put it into quotes"


def with_quoting_hint(error: click.UsageError) -> click.UsageError:
    """Return the error, with a hint to quote the pattern where the shell expanded it into several files."""
    # A command and its group both pass the error through here.
    if _QUOTES in error.message:
        return error
    extra = re.search(r"unexpected extra arguments? \((.*)\)", error.message)
    first = next((word for word in extra[1].split(" ") if os.path.exists(word)), "") if extra else ""  # noqa: PTH110
    if first:
        ending = os.path.splitext(first)[1]  # noqa: PTH122
        return click.UsageError(
            f"{error.message.rstrip('.')}: {first} is there; {_QUOTES}, such as '*{ending}'.", error.ctx
        )
    return error


def refuse_repeated(command: click.Command, ctx: click.Context, args: Sequence[str]) -> None:
    """Raise UsageError if an option that takes one value is given more than once: click would take the last one silently."""
    # The parser alone keeps repeated options apart; the parsed parameters hold the last value only.
    _, _, order = command.make_parser(ctx).parse_args(args=list(args))
    for option, times in Counter(order).items():
        if not isinstance(option, click.Option) or option.multiple or option.count or times < 2:
            continue
        if option.is_bool_flag and not option.secondary_opts:
            continue  # a flag without a counterpart has one meaning, however often it is given
        names = " or ".join((*option.opts, *option.secondary_opts))
        raise click.UsageError(f"{names} is given {times} times: it takes one value", ctx)


class Command(click.Command):
    """A command, of a group or a program of its own, that accepts renamed options and refuses repeated ones."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        args = with_current_names(self, args)
        refuse_repeated(self, ctx, args)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            raise with_quoting_hint(error) from None


class SectionedCommand(Command):
    """A command whose help shows its options under headings.

    Args:
        sections: heading -> parameter names, in the order of the help. Parameters in none of them come last, under "Other".
        examples: lines, printed unchanged at the end.
        *args: of `click.Command`.
        **kwargs: of `click.Command`.
    """

    def __init__(
        self, *args: Any, sections: Mapping[str, Sequence[str]], examples: Sequence[str] = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.sections = sections
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under headings, then the examples, which click would print before the options."""
        records = {
            option.name: record
            for option in self.get_params(ctx)
            if isinstance(option, click.Option) and (record := option.get_help_record(ctx)) is not None
        }
        placed = {name for names in self.sections.values() for name in names}
        headings = {**self.sections, "Other": [name for name in records if name not in placed]}
        # The same column for the help of all sections, whose lists click aligns one by one.
        names_columns = max(len(name) for name, _ in records.values() if len(name) <= _MAX_NAME_COLUMNS)
        for heading, names in headings.items():
            section_records = [records[name] for name in names if name in records]
            with formatter.section(heading):
                formatter.write_dl(
                    [(name.ljust(names_columns), text) for name, text in section_records],
                    col_max=_MAX_NAME_COLUMNS + 2,
                )
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n" if line else "\n")


class OrderedGroup(click.Group):
    """A group whose help lists commands in the order in which they are used, and which refuses repeated options.

    Args:
        order: names of commands, in the order of the help. Other commands follow by name.
        *args: of `click.Group`.
        **kwargs: of `click.Group`.
    """

    def __init__(self, *args: Any, order: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.order = order

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, arguments = super().resolve_command(ctx, args)
        # `Command` does both itself; commands of other classes are checked here.
        if command is not None and not isinstance(command, Command):
            arguments = with_current_names(command, arguments)
            refuse_repeated(command, click.Context(command, info_name=name, parent=ctx), arguments)
        return name, command, arguments

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            raise with_quoting_hint(error) from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [
            *(name for name in self.order if name in self.commands),
            *sorted(self.commands.keys() - set(self.order)),
        ]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the whole first sentence of each command, which click cuts to a line."""
        visible_commands = [
            (name, self.commands[name]) for name in self.list_commands(ctx) if not self.commands[name].hidden
        ]
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, command.get_short_help_str(limit=_SENTENCE)) for name, command in visible_commands]
            )


_SENTENCE = 200
"""Characters; longer than any first sentence."""


__all__ = ["HELP_SETTINGS", "Command", "OrderedGroup", "SectionedCommand"]
