import click
import pytest
from click.testing import CliRunner

from radio_cache.errors import ConfigError
from radio_cache.terminal.help import Command
from radio_cache.terminal.options import device_option, name_values, renamed_option, split_name_value


def test_a_text_is_split_at_its_first_equals_sign() -> None:
    assert split_name_value("a=b=c") == ("a", "b=c")
    assert split_name_value("=c") == ("", "c")
    assert split_name_value("abc") == (None, "abc")


def test_a_setting_without_a_value_is_named() -> None:
    assert name_values("--set", ["lr=1", "seed=2", "lr=3"]) == {"lr": "3", "seed": "2"}
    with pytest.raises(ConfigError, match="--set lr: write it as KEY=VALUE"):
        name_values("--set", ["seed=2", "lr"])


@click.command(cls=Command)
@click.option("--num-images", type=int, default=0)
@renamed_option("--shown", "--num-images")
@device_option()
@click.argument("files", nargs=-1)
def command(num_images: int, device: str, files: tuple[str, ...]) -> None:
    click.echo(f"{num_images} {device} {files}")


@pytest.mark.parametrize("arguments", [["--shown", "3"], ["--shown=3"]])
def test_an_old_name_of_an_option_still_works_and_says_the_new_one(arguments: list[str]) -> None:
    result = CliRunner().invoke(command, arguments)
    assert result.stdout == "3 auto ()\n"
    assert result.stderr == "--shown is called --num-images now\n"


def test_old_and_new_name_are_one_option() -> None:
    result = CliRunner().invoke(command, ["--shown", "3", "--num-images", "4"])
    assert result.exit_code == 2
    assert "--num-images is given 2 times" in result.output


def test_an_old_name_is_not_in_the_help_and_means_nothing_behind_two_dashes() -> None:
    assert "--shown" not in CliRunner().invoke(command, ["--help"]).output
    result = CliRunner().invoke(command, ["--", "--shown"])
    assert result.output == "0 auto ('--shown',)\n"
