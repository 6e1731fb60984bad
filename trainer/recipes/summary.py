"""A recipe in at most 25 lines, for the screen, before a run."""

from collections.abc import Iterator
from typing import Any

from trainer.recipes.recipe import Group, Recipe, Stage

MAX_LINES = 25
_NOT_FROM_PAPER = " (not from paper)"


def summarise_recipe(recipe: Recipe, *, width: int = 110) -> str:
    """Everything that decides the run. What the papers do not say, and we chose, is marked. width: columns of the screen."""
    lines = [f"recipe {recipe.name}: student {recipe.student}{_in_brackets(recipe.student_overrides)}"]
    lines += [line for number, stage in enumerate(recipe.stages) for line in _stage(recipe, number, stage)]
    if len(lines) > MAX_LINES - 8:
        left = len(lines) - (MAX_LINES - 9)
        lines = [*lines[: MAX_LINES - 9], f"  ... and {left} more lines of stages and groups: they are in recipe.json"]
    return "\n".join([*lines, *_folded(_settings(recipe), width)][:MAX_LINES])


def _stage(recipe: Recipe, number: int, stage: Stage) -> Iterator[str]:
    path = f"stages.{number}"

    def told(name: str, value: object) -> str:
        return f"{value}{_NOT_FROM_PAPER if f'{path}.{name}' in recipe.not_from_paper else ''}"

    groups = "" if len(stage.groups) == 1 else f", {len(stage.groups)} groups {recipe.groups}"
    yield (
        f"stage {number} '{stage.name}': {told('steps', f'{stage.steps:,} steps')}, rate {told('lr', f'{stage.lr:g}')}, "
        f"warm-up {told('warmup_steps', stage.warmup_steps)}{groups}"
    )
    for member, group in enumerate(stage.groups):
        yield f"  {_group(recipe, f'{path}.groups.{member}', group, alone=len(stage.groups) == 1)}"


def _group(recipe: Recipe, path: str, group: Group, *, alone: bool) -> str:
    who = "all teachers" if group.teachers == ("*",) else f"teachers {' '.join(group.teachers)}"
    not_from_paper = _NOT_FROM_PAPER if f"{path}.batch_images" in recipe.not_from_paper else ""
    rate = "" if alone else f", rate {group.rate:g}"
    mosaic = f" of {group.mosaic} x {group.mosaic} images" if group.mosaic > 1 else ""
    return f"{who}: {group.image_px} px{mosaic}, {group.batch_images} images a step{not_from_paper}{rate}"


def _settings(recipe: Recipe) -> Iterator[str]:
    shown_above = {"name", "student", "student_overrides", "stages", "groups", "not_from_paper"}
    for name, value in recipe.to_json().items():
        if name in shown_above or value == {}:
            continue
        not_from_paper = name in recipe.not_from_paper
        yield f"{name}={_short(value)}{_NOT_FROM_PAPER if not_from_paper else ''}"
    for path in recipe.not_from_paper:
        if path.startswith("student_overrides."):
            yield f"{path}{_NOT_FROM_PAPER}"


def _folded(words: Iterator[str], width: int) -> Iterator[str]:
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
        return ",".join(f"{key}:{_short(one)}" for key, one in value.items())  # pyright: ignore[reportUnknownVariableType]
    return (
        f"{value:g}"
        if isinstance(value, float)
        else str(value).lower()
        if isinstance(value, bool | None)
        else str(value)
    )


def _in_brackets(overrides: dict[str, Any]) -> str:
    return f" ({', '.join(f'{key}={_short(value)}' for key, value in overrides.items())})" if overrides else ""
