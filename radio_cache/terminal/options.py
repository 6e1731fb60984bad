"""Options shared by several commands, and the parsing of their values."""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, final

import click

from radio_cache.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])

_NAME_VALUE = re.compile(r"([^=]*)=(.*)", re.DOTALL)


def split_name_value(text: str) -> tuple[str | None, str]:
    """Return (name, value) of `NAME=VALUE`, or (None, text) without an equals sign.

    The first equals sign separates, so that a value may contain further ones.
    """
    parts = _NAME_VALUE.fullmatch(text)
    return (parts[1], parts[2]) if parts else (None, text)


def name_values(flag: str, texts: Sequence[str]) -> dict[str, str]:
    """Return name -> value of a repeatable `FLAG NAME=VALUE` option; the last of several values counts.

    Raises:
        ConfigError: a text has no equals sign.
    """
    values: dict[str, str] = {}
    for text in texts:
        name, value = split_name_value(text)
        if name is None:
            raise ConfigError(f"{flag} {text}: write it as KEY=VALUE")
        values[name] = value
    return values


def device_option(
    text: str = "Device to run on: cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.",
) -> Callable[[F], F]:
    """Return a decorator that adds `--device`, a name for `radio_cache.torch.pick_device`, to a command.

    Args:
        text: help of the option.
    """
    return click.option("--device", default="auto", show_default=True, metavar="NAME", help=text)


@final
class RenamedOption(click.Option):
    """The old name of an option: hidden, and replaced by the new one in `with_current_names`."""

    def __init__(self, old: str, new: str) -> None:
        # The parser never meets the old spelling, so that this option needs no value of its own.
        super().__init__([old], hidden=True, expose_value=False)
        self.old, self.new = old, new


def renamed_option(old: str, new: str) -> Callable[[F], F]:
    """Return a decorator that lets a command take an option by its old name, with a hint on standard error.

    Args:
        old: the earlier name, such as "--shown".
        new: the present name, such as "--num-images", which is an option of the command.
    """

    def decorate(function: F) -> F:
        # As `click.option` does, which takes no instance: decorated functions collect parameters from the bottom up.
        parameters = function.__dict__.setdefault("__click_params__", [])
        parameters.append(RenamedOption(old, new))
        return function

    return decorate


def with_current_names(command: click.Command, args: Sequence[str]) -> list[str]:
    """Return the arguments with old names of options replaced by the current ones.

    Prints one hint per old name on standard error (`renamed_option`).
    """
    new_names = {option.old: option.new for option in command.params if isinstance(option, RenamedOption)}
    if not new_names:
        return list(args)
    # Behind "--" there are no options.
    last = list(args).index("--") if "--" in args else len(args)
    current: list[str] = []
    hinted: set[str] = set()
    # Before parsing, so that the rules for repeated options see one option under one name.
    for argument in args[:last]:
        flag, equals, value = argument.partition("=")
        if flag in new_names:
            if flag not in hinted:
                click.echo(f"{flag} is called {new_names[flag]} now", err=True)
                hinted.add(flag)
            argument = f"{new_names[flag]}{equals}{value}"
        current.append(argument)
    return [*current, *args[last:]]
