"""The options of `radio-train` that describe its recipe: each is one field of `RecipeOptions`.

Name, type, default and help of an option stand at its field, and the command gets them by `recipe_options`. A field that sets
a value of the recipe has the name of that value (`batch_images`), whatever usual word its flag is (`--batch-size`).
"""

import types
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

import click

from radio_cache.errors import ConfigError
from radio_cache.reader import Cache
from radio_cache.terminal.options import name_values
from radio_cache.terminal.output import console
from trainer.recipes.auto import auto_recipe
from trainer.recipes.overrides import StageValues, apply_overrides
from trainer.recipes.presets import find_recipe, quick
from trainer.recipes.recipe import Recipe, override_stages

if TYPE_CHECKING:
    from trainer.model.student import StudentConfig

F = TypeVar("F", bound=Callable[..., Any])


def _flag(
    flag: str, help_text: str, *, metavar: str | None = None, section: str = "Recipe", lists: bool = False
) -> dict[str, Any]:
    """Return a field's metadata that make it an option. lists: the value "help" prints a table of names instead."""
    return {"flag": flag, "help": help_text, "metavar": metavar, "section": section, "lists": lists}


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """The recipe that a command line describes; None for a value that it leaves to the recipe."""

    student: str | None = field(
        default=None,
        metadata=_flag(
            "--student",
            "Student to train: e-radio-tiny, vit-s-16, timm:resnet18 ...; `--student help` lists them. [default: the recipe's]",
            metavar="NAME",
            section="Data and student",
            lists=True,
        ),
    )
    recipe: str | None = field(
        default=None,
        metadata=_flag(
            "--recipe",
            "Recipe to train by: quick, am-radio, phi-s, radio-v25 ... or a run's recipe.json; `--recipe help` lists them. "
            "[default: quick, with image size, steps and learning rate chosen for the cache and the student]",
            metavar="NAME",
            lists=True,
        ),
    )
    steps: int | None = field(
        default=None,
        metadata=_flag(
            "--steps", "Number of optimiser steps of all stages together. [default: the recipe's]", metavar="N"
        ),
    )
    batch_images: int | None = field(
        default=None,
        metadata=_flag(
            "--batch-size", "Images per optimiser step, over all processes. [default: the recipe's]", metavar="N"
        ),
    )
    image_px: int | None = field(
        default=None,
        metadata=_flag(
            "--image-size", "Side of the student's input crops, in pixels. [default: the recipe's]", metavar="PX"
        ),
    )
    centre_share: float | None = field(
        default=None,
        metadata=_flag(
            "--centre-share",
            "Side of the centre crop that the finished student takes of an image, as a share of the image's shorter side. Only "
            "for teachers that take a centre crop. [default: the smallest of the teachers']",
            metavar="SHARE",
        ),
    )
    holdout: float | None = field(
        default=None,
        metadata=_flag(
            "--holdout",
            "Share of the images to hold out of training for evaluations, such as 0.1. Images are selected by the digests of "
            "their files, so that the same ones are held out in every run. [default: none]",
            metavar="SHARE",
        ),
    )
    lr: float | None = field(
        default=None, metadata=_flag("--lr", "Peak learning rate. [default: the recipe's]", metavar="RATE")
    )
    seed: int | None = field(
        default=None,
        metadata=_flag(
            "--seed",
            "Seed of the initial weights, the order of images and the crops. [default: the recipe's]",
            metavar="N",
        ),
    )
    settings: tuple[str, ...] = field(
        default=(),
        metadata=_flag(
            "--set",
            "Set any field of the recipe, such as crop_area=0.5,1 or stages.1.groups.0.image_px=432 (docs/training.md). "
            "Repeatable.",
            metavar="KEY=VALUE",
        ),
    )
    init: Path | None = field(
        default=None,
        metadata=_flag(
            "--init",
            "Start from the weights of this finished student, the folder of a run or of an export. --student defaults to its "
            "network. Adaptors are initialised anew.",
            metavar="FOLDER",
            section="Initial weights",
        ),
    )
    pretrained: bool = field(
        default=False,
        metadata=_flag(
            "--pretrained",
            "Start a student that is a model of timm from timm's pretrained weights, which are downloaded from the Hugging "
            "Face Hub.",
            section="Initial weights",
        ),
    )


def option_names(section: str) -> tuple[str, ...]:
    """Return the names of the options below a heading of the help, in order."""
    return tuple(option.name for option in fields(RecipeOptions) if option.metadata["section"] == section)


def recipe_options(command: F) -> F:
    """Add every field of `RecipeOptions` to a command as an option. The command passes them on as keyword arguments."""
    annotations = get_type_hints(RecipeOptions)
    # Decorators collect parameters from the bottom up.
    for option in reversed(fields(RecipeOptions)):
        metadata, annotation = option.metadata, annotations[option.name]
        value_type = _value_type(annotation)
        # Eager options are handled before the required ones are missed.
        more: dict[str, Any] = {"is_eager": True, "callback": _print_names} if metadata["lists"] else {}
        command = click.option(
            metadata["flag"],
            option.name,
            # A flag has no type, and click's own path type keeps `Path`.
            type=None if value_type is bool else click.Path(path_type=Path) if value_type is Path else value_type,
            is_flag=value_type is bool,
            multiple=get_origin(annotation) is tuple,
            default=option.default,
            metavar=metadata["metavar"],
            help=metadata["help"],
            **more,
        )(command)
    return command


def _value_type(annotation: Any) -> type:
    """Return `int` for `int | None`, and `str` for `tuple[str, ...]`."""
    if get_origin(annotation) in (types.UnionType, tuple):
        return get_args(annotation)[0]
    return annotation


def _print_names(context: click.Context, option: click.Parameter, name: str | None) -> str | None:
    """Print the table of names and end, for `--student help` and `--recipe help`; runs before required options are checked."""
    if name == "help":
        from trainer.recipes.help import recipe_tables, student_tables

        for part in student_tables() if option.name == "student" else recipe_tables():
            console().print(part, soft_wrap=isinstance(part, str))
        context.exit()
    return name


def recipe_of_options(options: RecipeOptions, cache: str | Path, teachers: tuple[str, ...], device: str) -> Recipe:
    """Return the recipe that the options describe: a preset, a saved one, or one chosen for the cache and the student.

    Args:
        options: as given on the command line.
        cache: path or URL of the cache, from which the automatic recipe takes its sizes.
        teachers: names of the teachers to learn from; all of the cache if empty.
        device: name of the device, from which the automatic recipe takes its batch size.

    Raises:
        ConfigError: a name or a setting is unknown, or options exclude each other.
    """
    overrides = name_values("--set", options.settings)
    student = options.student
    initial = None if options.init is None else _initial_student(options.init, pretrained=options.pretrained)
    if initial is not None:
        student = student or initial.student
    if options.recipe is None:
        recipe = auto_recipe(
            quick(), Cache(cache), teachers, student, device, steps=options.steps, batch_images=options.batch_images
        )
    else:
        recipe = _with_student(find_recipe(options.recipe), student)
    recipe = override_stages(recipe, **_given_values(options, StageValues))
    recipe = replace(recipe, **_given_values(options, Recipe, but=("student", "init")))
    # The student's weights come after its name is final.
    if initial is not None and options.init is not None:
        recipe = _with_initial_weights(recipe, initial, options.init)
    if options.pretrained:
        recipe = _with_pretrained_weights(recipe)
    # Last, so that --set can change anything that was chosen above.
    return apply_overrides(recipe, overrides)


def _given_values(options: RecipeOptions, owner: type, but: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the options on the command line that are fields of `owner`, by name."""
    names = {item.name for item in fields(owner)} - set(but)
    values = {item.name: getattr(options, item.name) for item in fields(options) if item.name in names}
    # None is an option that was not given; no field of a recipe that has an option can be set to None by it.
    return {name: value for name, value in values.items() if value is not None}


def _with_student(recipe: Recipe, student: str | None) -> Recipe:
    if student is None or student == recipe.student:
        return recipe
    # The recipe's settings of its own student are those of another network.
    not_from_paper = tuple(path for path in recipe.not_from_paper if not path.startswith("student_overrides."))
    return replace(recipe, student=student, student_overrides={}, not_from_paper=not_from_paper)


def _with_initial_weights(recipe: Recipe, initial: "StudentConfig", folder: Path) -> Recipe:
    from trainer.model.student import STARTING_SETTINGS

    # Another network can start from it, too, as far as shapes agree; only the same one takes its settings.
    if recipe.student == initial.student:
        overrides = {key: value for key, value in initial.overrides.items() if key not in STARTING_SETTINGS}
        recipe = replace(recipe, student_overrides={**overrides, **recipe.student_overrides})
    return replace(recipe, init=str(folder.absolute()))


def _with_pretrained_weights(recipe: Recipe) -> Recipe:
    from trainer.students import is_of_timm

    if not is_of_timm(recipe.student):
        raise ConfigError(
            f"--pretrained: student '{recipe.student}' is no model of timm, and has no weights of its own. A ViT starts from "
            "one of timm with --set student_overrides.init_from=MODEL, any student from a finished one with --init"
        )
    return replace(recipe, student_overrides={**recipe.student_overrides, "pretrained": True})


def _initial_student(folder: Path, *, pretrained: bool) -> "StudentConfig":
    """Return the configuration of the finished student of --init."""
    from trainer.model.files import holds_student, read_config

    if pretrained:
        raise ConfigError("--init and --pretrained exclude each other: a student starts with one set of weights")
    if not holds_student(folder):
        raise ConfigError(
            f"--init {folder} holds no finished student: give the folder of a finished run, or of radio-export"
        )
    return read_config(folder)[0]
