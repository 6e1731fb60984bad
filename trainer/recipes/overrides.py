"""Overrides of single settings of a recipe, `--set KEY=VALUE`, with the type of their field."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar, cast

from radio_cache.errors import ConfigError, unknown_name
from radio_cache.format.strict_json import from_json
from trainer.recipes.recipe import Recipe, override_stages

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StageValues:
    """Settings of stages and groups that may be set without a path, for all of them."""

    steps: int | None = None
    lr: float | None = None
    warmup_steps: int | None = None
    image_px: int | None = None
    batch_images: int | None = None


_STAGE_VALUES = tuple(item.name for item in fields(StageValues))


def apply_overrides(recipe: Recipe, settings: Mapping[str, str]) -> Recipe:
    """Return the recipe with overrides such as `seed=3`, `stages.0.groups.1.image_px=512` or `student_overrides.depth=3`.

    Args:
        recipe: recipe to change.
        settings: path of a setting -> text of its value. Names of `StageValues` hold for all stages and groups
            (`trainer.recipes.recipe.override_stages`), and are applied before paths.

    Raises:
        ConfigError: a path is unknown, and the message names the nearest, or a value does not fit its field.
    """
    shared = StageValues()
    for key, text in settings.items():
        if key in _STAGE_VALUES:
            values = _first_fitting(key, text, lambda value, key=key: from_json(StageValues, {key: value}))
            shared = replace(shared, **{key: getattr(values, key)})
    recipe = override_stages(recipe, **asdict(shared))
    for key, text in settings.items():
        if key not in _STAGE_VALUES:
            recipe = _with_override(recipe, key, text)
    return recipe


def _with_override(recipe: Recipe, key: str, text: str) -> Recipe:
    # Through JSON: tuples become lists, whose items can be replaced.
    data = json.loads(json.dumps(recipe.to_json()))
    *path, last = key.split(".")
    inner: Any = data
    for depth, part in enumerate(path):
        inner = inner[_key_of(inner, part, key, path[:depth], text)]
    innermost_key = _key_of(inner, last, key, path, text)

    def with_value(value: Any) -> Recipe:
        inner[innermost_key] = value
        return from_json(Recipe, data)

    return _first_fitting(key, text, with_value)


def _key_of(inner: Any, part: str, key: str, before: list[str], text: str) -> str | int:
    """Return the key, or the position in a list, that a part of a path names. before: the parts before it."""
    parent = ".".join(before)
    if isinstance(inner, list):
        if part.isdigit() and int(part) < len(cast(list[Any], inner)):
            return int(part)
        raise ConfigError(
            f"--set {key}={text}: {parent} has {len(cast(list[Any], inner))}, counted from 0; there is no {part}"
        )
    if not isinstance(inner, dict):
        raise ConfigError(f"--set {key}={text}: '{parent}' is one value, it has no '{part}'")
    # These take any names: settings of the student, and teachers.
    is_free = parent in ("student_overrides", "teacher_weights", "teacher_summary_weights")
    known = [name for name in cast(dict[str, Any], inner) if parent or name != "name"]
    if part not in known and not is_free:
        raise ConfigError(
            unknown_name(
                "recipe setting" + (f" of {parent}" if parent else ""),
                part,
                [*known, *(() if parent else _STAGE_VALUES)],
            )
        )
    return part


def _first_fitting(key: str, text: str, make: Callable[[Any], T]) -> T:
    """Return `make` of the first reading of a text that fits its field."""
    # The first reading is the likeliest, so its error is the one to report.
    error: ValueError | None = None
    for value in _readings(text):
        try:
            return make(value)
        except ValueError as exc:
            error = error or exc
    raise ConfigError(f"--set {key}={text}: {error}")


def _readings(text: str) -> Iterable[Any]:
    """Yield the possible meanings of a text: JSON, the plain text, None, and a list of values at its commas."""
    literal = _literal(text)
    yield literal
    if literal != text:
        yield text  # a name such as "1" in a list of teachers
    if text.lower() == "none":
        yield None
    if not isinstance(literal, list):
        yield [_literal(part) for part in text.split(",")]


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
