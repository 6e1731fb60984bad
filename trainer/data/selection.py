"""Which teachers and which images of a cache a run takes."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import ConfigError, MissingRowsError, StoreError, unknown_name
from radio_cache.reader import Cache
from trainer.recipes.recipe import Recipe


def select_teachers(cache: Cache, names: Sequence[str], recipe: Recipe) -> tuple[str, ...]:
    """The teachers asked for, or all there are. Raises StoreError where there are none, ConfigError for unknown names."""
    if not cache.teachers:
        cache.teachers.refuse_unreadable()
        raise StoreError(f"{cache.url} holds no teacher yet: radio-cache build --out {cache.url} --teacher NAME ...")
    for name in (*names, *recipe.teacher_weights, *recipe.teacher_summary_weights):
        if name not in (*cache.teachers.names(), *cache.teachers, *cache.teachers.unreadable):
            raise ConfigError(f"{cache.url}: " + unknown_name("cached teacher", name, cache.teachers))
    if not names:
        cache.teachers.refuse_unreadable()
    return tuple(names) or cache.teachers.names()


def teachers_by_group(recipe: Recipe, names: Sequence[str]) -> dict[tuple[int, int], tuple[str, ...]]:
    """(stage, group) -> its teachers among these names, in their order. Raises ConfigError for a group that has none."""
    found: dict[tuple[int, int], tuple[str, ...]] = {}
    for number, stage in enumerate(recipe.stages):
        for member, group in enumerate(stage.groups):
            found[number, member] = tuple(name for name in names if _matches(name, group.teachers))
            if not found[number, member]:
                path = f"stages.{number}.groups.{member}"
                raise ConfigError(
                    f"recipe '{recipe.name}', stage '{stage.name}': {path} asks for teachers {', '.join(group.teachers)}, and "
                    f"there are {', '.join(names)}: build that teacher, or say which: --set {path}.teachers={names[-1]}"
                )
    return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")]
    unwanted = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    if any(fnmatchcase(name, pattern) for pattern in unwanted):
        return False
    return not wanted or any(fnmatchcase(name, pattern) for pattern in wanted)


def usable_rows(cache: Cache, teachers: Sequence[str], *, allow_partial: bool) -> NDArray[np.int64]:
    """The images that all these teachers have seen, at every size they are kept at.

    Raises MissingRowsError for an unfinished cache unless it may be one, ConfigError where no image is left.
    """
    groups = [level.name for name in teachers for level in cache.teachers.levels(name)]
    if not allow_partial:
        for name in groups:
            done = int(cache.receipt_columns(name).num_rows.sum())
            if done < cache.num_images:
                raise MissingRowsError(
                    f"{cache.url}: teacher '{name}' has seen {done} of {cache.num_images} images: run the build to its end, or "
                    "train on what is there with --allow-partial"
                )
    rows = cache.usable_rows(groups)
    if len(rows) == 0:
        raise ConfigError(
            f"{cache.url} has no image that is complete for {', '.join(teachers)}: run the build to its end"
        )
    return rows
