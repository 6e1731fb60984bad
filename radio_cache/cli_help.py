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


__all__ = ["HELP_SETTINGS", "SectionedCommand"]
