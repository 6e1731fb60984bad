"""Help under headings: every option once, where a terminal of 80 columns shows it."""

import re

import click
import pytest
from click.testing import CliRunner

from cache_builder.cli import main as radio_cache
from radio_cache.cli_help import SectionedCommand
from trainer.cli import main as radio_train

COMMANDS = {
    f"{program.name} {name}".strip(): command
    for program in (radio_cache, radio_train)
    for name, command in ({"": program} | getattr(program, "commands", {})).items()
    if isinstance(command, SectionedCommand)
}


def help_of(command: click.Command) -> str:
    return CliRunner(env={"COLUMNS": "80"}).invoke(command, ["--help"], terminal_width=80).output


def test_the_long_commands_have_headings() -> None:
    assert {name.split()[-1] for name in COMMANDS} >= {"build", "plan", "copy"}
    assert radio_train in COMMANDS.values()


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_option_is_shown_once_and_sections_name_no_other(command: SectionedCommand) -> None:
    shown = re.findall(r"^  (?:-\w, )?(--[\w-]+)", help_of(command), flags=re.MULTILINE)
    options = [option for option in command.params if isinstance(option, click.Option)]
    assert sorted(shown) == sorted([max(option.opts, key=len) for option in options] + ["--help"])
    assert {name for names in command.sections.values() for name in names} <= {
        name for option in (*options, *radio_cache.commands["build"].params) if (name := option.name)
    }


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_help_fits_eighty_columns_and_ends_with_examples(command: SectionedCommand) -> None:
    lines = help_of(command).splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert "Examples:" in lines
    assert all(line.startswith("  ") for line in lines[lines.index("Examples:") + 1 :])


def test_commands_are_listed_in_the_order_of_their_use_and_none_is_left_out() -> None:
    listed = radio_cache.list_commands(click.Context(radio_cache))
    assert listed[:4] == ["demo", "teachers", "plan", "build"]
    assert sorted(listed) == sorted(radio_cache.commands)
