"""Help under headings: every option once, where a terminal of 80 columns shows it."""

import re
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from cache_builder.cli import main as radio_cache
from evals.cli import main as radio_eval
from radio_cache.terminal.help import OrderedGroup, SectionedCommand
from radio_cache.terminal.options import RenamedOption
from trainer.cli import main as radio_train
from trainer.export_cli import main as radio_export

COMMANDS = {
    f"{program.name} {name}".strip(): command
    for program in (radio_cache, radio_train)
    for name, command in ({"": program} | getattr(program, "commands", {})).items()
    if isinstance(command, SectionedCommand)
}


ALL_COMMANDS = {
    f"{program.name} {name}".strip(): command
    for program in (radio_cache, radio_train, radio_eval, radio_export)
    for name, command in ({"": program} | getattr(program, "commands", {})).items()
}


@pytest.mark.parametrize("command", ALL_COMMANDS.values(), ids=ALL_COMMANDS)
def test_every_old_name_of_an_option_leads_to_an_option_of_the_command(command: click.Command) -> None:
    flags = {flag for option in command.params for flag in option.opts if not isinstance(option, RenamedOption)}
    renamed = [option for option in command.params if isinstance(option, RenamedOption)]
    assert all(option.new in flags and option.old not in flags for option in renamed)


def help_of(command: click.Command) -> str:
    return CliRunner(env={"COLUMNS": "80"}).invoke(command, ["--help"], terminal_width=80).output


def test_the_long_commands_have_headings() -> None:
    assert {name.split()[-1] for name in COMMANDS} >= {"build", "plan", "copy"}
    assert radio_train in COMMANDS.values()


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_option_is_shown_once_and_sections_name_no_other(command: SectionedCommand) -> None:
    shown = re.findall(r"^  (?:-\w, )?(--[\w-]+)", help_of(command), flags=re.MULTILINE)
    options = [option for option in command.params if isinstance(option, click.Option) and not option.hidden]
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


# ---------------------------------------------------------------- options given twice

EVERY = {
    f"{number} {name}".strip(): (program, name)
    for number, program in {
        "cache": radio_cache,
        "train": radio_train,
        "eval": radio_eval,
        "export": radio_export,
    }.items()
    for name in getattr(program, "commands", {"": program})
}


def values_of(option: click.Option) -> tuple[str, str]:
    """Two values that the command's parser takes."""
    choices = getattr(option.type, "choices", None)
    return (choices[0], choices[-1]) if choices else ("1", "2")


@pytest.mark.parametrize(("program", "name"), EVERY.values(), ids=EVERY)
def test_an_option_that_takes_one_value_is_not_taken_twice(program: click.Command, name: str) -> None:
    command = program.commands[name] if isinstance(program, click.Group) else program
    single = [
        option
        for option in command.params
        if isinstance(option, click.Option) and not option.multiple and not option.is_eager and not option.is_flag
        if not isinstance(option, RenamedOption)  # read, and refused, as the option that it is called now
    ]
    assert single or name in ("repair", "info", "verify", "drop-teacher", "relocate"), "nothing to try"
    for option in single:
        first, second = values_of(option)
        given = [option.opts[0], *[first] * option.nargs, option.opts[-1], *[second] * option.nargs]
        refused = CliRunner().invoke(program, [*([name] if name else []), *given])
        assert refused.exit_code == 2
        assert f"{' or '.join(option.opts)} is given 2 times: it takes one value" in " ".join(refused.output.split()), (
            option
        )


def test_an_eager_option_is_not_taken_twice_either_and_repeatable_ones_and_flags_are() -> None:
    refused = CliRunner().invoke(radio_train, ["--recipe", "am-radio", "--recipe", "phi-s"])
    assert "--recipe is given 2 times" in refused.output
    twice = ["--images", "a", "--images", "b", "--teacher", "x", "--teacher", "y", "--rescan", "--rescan", "--out", "c"]
    assert "no teacher is called 'x'" in CliRunner().invoke(radio_cache, ["build", *twice]).output


@pytest.mark.parametrize("grouped", [True, False])
def test_a_pattern_that_the_shell_took_apart_is_told_to_be_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grouped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.tar", "b.tar", "c.tar"):
        (tmp_path / name).touch()
    kind: dict[str, Any] = {} if grouped else {"cls": SectionedCommand, "sections": {}}

    @click.command("build", **kind)
    @click.option("--images", multiple=True)
    def build(images: tuple[str, ...]) -> None: ...

    group = OrderedGroup("main", order=())
    group.add_command(build)
    command, arguments = (group, ["build"]) if grouped else (build, [])
    result = CliRunner().invoke(command, [*arguments, "--images", "a.tar", "b.tar", "c.tar"])
    assert result.exit_code == 2
    hint = "b.tar is there; if the shell expanded a pattern, put it into quotes, such as '*.tar'."
    assert f"Got unexpected extra arguments (b.tar c.tar): {hint}" in result.output
    assert "quotes" not in CliRunner().invoke(command, [*arguments, "--images", "a.tar", "typo"]).output
