"""Help of commands with many options: under headings, each option once, examples at the end."""

from collections.abc import Mapping, Sequence
from typing import Any

import click

HELP_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
"""Of every command: -h too, and as wide as the terminal up to 100 columns."""

_MOST_NAME_COLUMNS = 24
"""Longer names of options put their help on the next line."""


class SectionedCommand(click.Command):
    """A command whose help shows its options under headings.

    sections: heading -> parameter names, in the order shown; what is in none of them comes last, under "Other".
    examples: lines, shown as they are.
    """

    def __init__(
        self, *args: Any, sections: Mapping[str, Sequence[str]], examples: Sequence[str] = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.sections = sections
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Also writes the examples: click has them before the options otherwise."""
        records = {
            option.name: record
            for option in self.get_params(ctx)
            if isinstance(option, click.Option) and (record := option.get_help_record(ctx)) is not None
        }
        placed = {name for names in self.sections.values() for name in names}
        headings = {**self.sections, "Other": [name for name in records if name not in placed]}
        names_columns = max(len(name) for name, _ in records.values() if len(name) <= _MOST_NAME_COLUMNS)
        for heading, names in headings.items():
            shown = [records[name] for name in names if name in records]
            with formatter.section(heading):  # padded, so that all sections have their help in one column
                formatter.write_dl(
                    [(name.ljust(names_columns), text) for name, text in shown], col_max=_MOST_NAME_COLUMNS + 2
                )
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n" if line else "\n")


class OrderedGroup(click.Group):
    """A group whose help lists commands in the order in which they are used, and those not in `order` behind them."""

    def __init__(self, *args: Any, order: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.order = order

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [
            *(name for name in self.order if name in self.commands),
            *sorted(self.commands.keys() - set(self.order)),
        ]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The whole first sentence of each, which click cuts to a line."""
        shown = [(name, self.commands[name]) for name in self.list_commands(ctx) if not self.commands[name].hidden]
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(limit=_SENTENCE)) for name, command in shown])


_SENTENCE = 200
"""Characters; longer than any first sentence."""


__all__ = ["HELP_SETTINGS", "OrderedGroup", "SectionedCommand"]
