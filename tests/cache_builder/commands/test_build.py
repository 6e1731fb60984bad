"""An option of `radio-cache build` has one name and one default: those of the field of the configuration."""

from dataclasses import fields

import click
import pytest

from cache_builder.build_config import BUILD_DEFAULTS, BuildConfig
from cache_builder.commands.build import BUILD_SECTIONS, build
from cache_builder.commands.build_options import TeacherFlags

OPTIONS = {option.name: option for option in build.params if isinstance(option, click.Option) and option.expose_value}
OF_TEACHERS = set(TeacherFlags.__annotations__)
"""Options with a value per teacher, which become `TeacherOptions`."""

OF_PIXELS = {"store_pixels", "pixel_format"}
"""Options that make the field `pixels`."""

OF_WORKERS = {"workers", "scheduler", "cluster"}
"""Options that choose who builds, not what is built."""

RESOLVED = {"device"}
"""Options whose default is found at run time."""


def test_every_option_is_a_field_and_every_field_an_option() -> None:
    names = {field.name for field in fields(BuildConfig)}
    assert set(OPTIONS) - OF_TEACHERS - OF_PIXELS - OF_WORKERS == names - {"pixels"}


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_the_flag_has_the_name_of_the_field(name: str) -> None:
    flag = OPTIONS[name].opts[0].removeprefix("--").replace("-", "_")
    plural = f"{flag}s" if OPTIONS[name].multiple and name not in OF_TEACHERS else flag
    assert name in (flag, plural) or (flag, name) == ("compile", "compiled")  # a function of Python


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - OF_TEACHERS - OF_PIXELS - OF_WORKERS - RESOLVED))
def test_the_default_is_that_of_the_field_or_none_which_takes_it(name: str) -> None:
    option = OPTIONS[name]
    arguments = ["--images", "x", "--teacher", "clip", "--out", "c.zarr"]
    value = build.make_context("build", arguments).params[name]
    assert option.required or value is None or value == BUILD_DEFAULTS[name]


def test_every_option_below_a_heading_exists() -> None:
    assert {name for names in BUILD_SECTIONS.values() for name in names} <= set(OPTIONS)
