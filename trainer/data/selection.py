"""Selection of the teachers and images of a cache that a run uses."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import ConfigError, MissingRowsError, StoreError, unknown_name
from radio_cache.reader import Cache
from trainer.recipes.recipe import Recipe


def select_teachers(cache: Cache, names: Sequence[str], recipe: Recipe) -> tuple[str, ...]:
    """Return the teachers named, or all of the cache.

    Raises:
        StoreError: the cache holds no teacher.
        ConfigError: a name, also one in the recipe's weights, is not a cached teacher.
    """
    if not cache.teachers:
        cache.teachers.refuse_unreadable()
        raise StoreError(f"{cache.url} holds no teacher yet: radio-cache build --out {cache.url} --teacher NAME ...")
    for name in (*names, *recipe.teacher_weights, *recipe.teacher_summary_weights):
        if name not in (*cache.teachers.names(), *cache.teachers, *cache.teachers.unreadable):
            raise ConfigError(f"{cache.url}: " + unknown_name("cached teacher", name, cache.teachers))
    # A damaged teacher must not be left out silently where all are meant.
    if not names:
        cache.teachers.refuse_unreadable()
    return tuple(names) or cache.teachers.names()


def teachers_by_group(recipe: Recipe, names: Sequence[str]) -> dict[tuple[int, int], tuple[str, ...]]:
    """Return (stage, group) -> the teachers among `names` that match the group's patterns, in order.

    Raises:
        ConfigError: a group has no teacher.
    """
    by_group: dict[tuple[int, int], tuple[str, ...]] = {}
    for number, stage in enumerate(recipe.stages):
        for member, group in enumerate(stage.groups):
            by_group[number, member] = tuple(name for name in names if _matches(name, group.teachers))
            if not by_group[number, member]:
                path = f"stages.{number}.groups.{member}"
                raise ConfigError(
                    f"recipe '{recipe.name}', stage '{stage.name}': {path} asks for teachers {', '.join(group.teachers)}, and "
                    f"there are {', '.join(names)}: build that teacher, or say which: --set {path}.teachers={names[-1]}"
                )
    return by_group


def _matches(name: str, patterns: Sequence[str]) -> bool:
    included = [pattern for pattern in patterns if not pattern.startswith("!")]
    excluded = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    if any(fnmatchcase(name, pattern) for pattern in excluded):
        return False
    # Exclusions alone select all other teachers.
    return not included or any(fnmatchcase(name, pattern) for pattern in included)


def usable_rows(cache: Cache, teachers: Sequence[str], *, allow_partial: bool) -> NDArray[np.int64]:
    """Return the rows with features of all these teachers, at every cached input size.

    Raises:
        MissingRowsError: the cache is unfinished and `allow_partial` is False.
        ConfigError: no image is complete.
    """
    groups = [level.name for name in teachers for level in cache.teachers.levels(name)]
    if not allow_partial:
        for name in groups:
            num_done = int(cache.receipt_columns(name).num_rows.sum())
            if num_done < cache.num_images:
                raise MissingRowsError(
                    f"{cache.url}: teacher '{name}' has seen {num_done} of {cache.num_images} images: run the build to its end, "
                    "or train on what is there with --allow-partial"
                )
    rows = cache.usable_rows(groups)
    if len(rows) == 0:
        raise ConfigError(
            f"{cache.url} has no image that is complete for {', '.join(teachers)}: run the build to its end"
        )
    return rows
