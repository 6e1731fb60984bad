"""The summary of a recipe in at most 25 lines, printed before a run."""

from collections.abc import Iterator
from typing import Any

from trainer.recipes.recipe import Group, Recipe, Stage

# About the height of a terminal.
MAX_LINES = 25
_NOT_FROM_PAPER = " (not from paper)"


def summarise_recipe(recipe: Recipe, *, width: int = 110) -> str:
    """Return a summary of all settings, with a mark at those that are not from the paper.

    Args:
        recipe: recipe to describe.
        width: columns of the screen.
    """
    lines = [f"recipe {recipe.name}: student {recipe.student}{_in_brackets(recipe.student_overrides)}"]
    lines += [line for number, stage in enumerate(recipe.stages) for line in _stage(recipe, number, stage)]
    # The settings below take up to eight lines; long schedules are cut instead.
    if len(lines) > MAX_LINES - 8:
        num_more = len(lines) - (MAX_LINES - 9)
        lines = [
            *lines[: MAX_LINES - 9],
            f"  ... and {num_more} more lines of stages and groups: they are in recipe.json",
        ]
    return "\n".join([*lines, *_wrapped(_settings(recipe), width)][:MAX_LINES])


def _stage(recipe: Recipe, number: int, stage: Stage) -> Iterator[str]:
    path = f"stages.{number}"

    def marked(name: str, value: object) -> str:
        return f"{value}{_NOT_FROM_PAPER if f'{path}.{name}' in recipe.not_from_paper else ''}"

    groups = "" if len(stage.groups) == 1 else f", {len(stage.groups)} groups {recipe.groups}"
    yield (
        f"stage {number} '{stage.name}': {marked('steps', f'{stage.steps:,} steps')}, rate {marked('lr', f'{stage.lr:g}')}, "
        f"warm-up {marked('warmup_steps', stage.warmup_steps)}{groups}"
    )
    for member, group in enumerate(stage.groups):
        yield f"  {_group(recipe, f'{path}.groups.{member}', group, alone=len(stage.groups) == 1)}"


def _group(recipe: Recipe, path: str, group: Group, *, alone: bool) -> str:
    teachers = "all teachers" if group.teachers == ("*",) else f"teachers {' '.join(group.teachers)}"
    not_from_paper = _NOT_FROM_PAPER if f"{path}.batch_images" in recipe.not_from_paper else ""
    rate = "" if alone else f", rate {group.rate:g}"
    mosaic = f" of {group.mosaic} x {group.mosaic} images" if group.mosaic > 1 else ""
    return f"{teachers}: {group.image_px} px{mosaic}, {group.batch_images} images a step{not_from_paper}{rate}"


def _settings(recipe: Recipe) -> Iterator[str]:
    in_lines_above = {"name", "student", "student_overrides", "stages", "groups", "not_from_paper"}
    for name, value in recipe.to_json().items():
        if name in in_lines_above or value == {}:
            continue
        not_from_paper = name in recipe.not_from_paper
        yield f"{name}={_short(value)}{_NOT_FROM_PAPER if not_from_paper else ''}"
    # Settings of the student stand in the first line, without room for a mark.
    for path in recipe.not_from_paper:
        if path.startswith("student_overrides."):
            yield f"{path}{_NOT_FROM_PAPER}"


def _wrapped(words: Iterator[str], width: int) -> Iterator[str]:
    line = ""
    for word in words:
        if line and len(line) + len(word) + 2 > width:
            yield line
            line = ""
        line += f"  {word}"
    yield line


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_short, value))  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(value, dict):
        return ",".join(f"{key}:{_short(item)}" for key, item in value.items())  # pyright: ignore[reportUnknownVariableType]
    return (
        f"{value:g}"
        if isinstance(value, float)
        else str(value).lower()
        if isinstance(value, bool | None)
        else str(value)
    )


def _in_brackets(overrides: dict[str, Any]) -> str:
    return f" ({', '.join(f'{key}={_short(value)}' for key, value in overrides.items())})" if overrides else ""
