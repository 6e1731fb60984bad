"""`--set key=value`: single settings of a recipe, typed by their field, and how a recipe is shown before a run."""

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
    """Settings of stages and groups that may be given without saying which, where one value says enough."""

    steps: int | None = None
    lr: float | None = None
    warmup_steps: int | None = None
    image_px: int | None = None
    batch_images: int | None = None


_STAGE_VALUES = tuple(item.name for item in fields(StageValues))


def apply_overrides(recipe: Recipe, settings: Mapping[str, str]) -> Recipe:
    """The recipe with `key=value` texts applied: `seed=3`, `stages.0.groups.1.image_px=512`, `student_overrides.depth=3`.

    Keys of `Shared` hold for all stages and groups (`trainer.recipes.recipe.everywhere`), and come before the others.
    Raises ConfigError for unknown keys, the nearest first, and for values that do not fit the field.
    """
    shared = StageValues()
    for key, text in settings.items():
        if key in _STAGE_VALUES:
            found = _fitting(key, text, lambda value, key=key: from_json(StageValues, {key: value}))
            shared = replace(shared, **{key: getattr(found, key)})
    recipe = override_stages(recipe, **asdict(shared))
    for key, text in settings.items():
        if key not in _STAGE_VALUES:
            recipe = _with_one(recipe, key, text)
    return recipe


def _with_one(recipe: Recipe, key: str, text: str) -> Recipe:
    data = json.loads(json.dumps(recipe.to_json()))
    *path, last = key.split(".")
    inner: Any = data
    for depth, part in enumerate(path):
        inner = inner[_place(inner, part, key, path[:depth], text)]
    place = _place(inner, last, key, path, text)

    def changed(value: Any) -> Recipe:
        inner[place] = value
        return from_json(Recipe, data)

    return _fitting(key, text, changed)


def _place(inner: Any, part: str, key: str, before: list[str], text: str) -> str | int:
    """The key or the position that a part of a path names."""
    where = ".".join(before)
    if isinstance(inner, list):
        if part.isdigit() and int(part) < len(cast(list[Any], inner)):
            return int(part)
        raise ConfigError(
            f"--set {key}={text}: {where} has {len(cast(list[Any], inner))}, counted from 0; there is no {part}"
        )
    if not isinstance(inner, dict):
        raise ConfigError(f"--set {key}={text}: '{where}' is one value, it has no '{part}'")
    free = where in ("student_overrides", "teacher_weights", "teacher_summary_weights")
    known = [name for name in cast(dict[str, Any], inner) if where or name != "name"]
    if part not in known and not free:
        raise ConfigError(
            unknown_name(
                "recipe setting" + (f" of {where}" if where else ""), part, [*known, *(() if where else _STAGE_VALUES)]
            )
        )
    return part


def _fitting(key: str, text: str, made: Callable[[Any], T]) -> T:
    """What is made of the first reading of the text that its place takes: JSON, plain text, nothing, a list."""
    error: ValueError | None = None
    for value in _readings(text):
        try:
            return made(value)
        except ValueError as exc:
            error = error or exc
    raise ConfigError(f"--set {key}={text}: {error}")


def _readings(text: str) -> Iterable[Any]:
    literal = _literal(text)
    yield literal
    if literal != text:
        yield text
    if text.lower() == "none":
        yield None
    if not isinstance(literal, list):
        yield [_literal(part) for part in text.split(",")]


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
