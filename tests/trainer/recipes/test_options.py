"""Each option of radio-train is one field, of the recipe, of its stages, or of the run's configuration."""

from dataclasses import fields, replace
from typing import get_type_hints

import click

from radio_cache.reader import Cache
from trainer.cli import main
from trainer.recipes.options import RecipeOptions, recipe_of_options
from trainer.recipes.overrides import StageValues
from trainer.recipes.presets import quick
from trainer.recipes.recipe import Group, Recipe, Stage
from trainer.train_config import TrainConfig

NOT_VALUES = {"recipe", "settings", "pretrained"}
"""Options that choose a recipe or change it by a path, and are no value of it."""


def names(owner: type) -> set[str]:
    return {item.name for item in fields(owner)}


def test_an_option_has_the_name_of_the_field_that_it_sets() -> None:
    assert names(RecipeOptions) - NOT_VALUES <= names(Recipe) | names(StageValues)
    assert names(StageValues) <= names(Stage) | names(Group)
    options = {option.name for option in main.params if isinstance(option, click.Option)} - {"version", "allow_module"}
    config = names(TrainConfig) - {"recipe", "data_threads", "shard_cache_bytes"}
    assert options == config | names(RecipeOptions)


def test_an_option_has_the_type_of_the_field_that_it_sets() -> None:
    option_types = get_type_hints(RecipeOptions)
    for owner in (Recipe, StageValues, Stage, Group):
        for name, kind in get_type_hints(owner).items():
            if name in option_types and name not in ("init", "steps"):
                assert option_types[name] in (kind, kind | None), (owner, name)


def test_every_option_is_below_a_heading_of_the_help() -> None:
    assert isinstance(main, click.Command)
    placed = [name for heading in main.sections.values() for name in heading]  # type: ignore[attr-defined]
    assert len(placed) == len(set(placed))
    assert names(RecipeOptions) <= set(placed)


def test_an_option_changes_its_field_and_set_comes_last(tiny_cache: Cache) -> None:
    def recipe(options: RecipeOptions) -> Recipe:
        return recipe_of_options(options, tiny_cache.path, (), "cpu")

    plain = RecipeOptions(recipe="quick")
    assert recipe(plain) == quick()
    changed = recipe(
        replace(plain, seed=3, holdout=0.25, centre_share=0.5, batch_images=2, image_px=64, steps=9, lr=0.5)
    )
    assert (changed.seed, changed.holdout, changed.centre_share) == (3, 0.25, 0.5)
    [stage] = changed.stages
    assert (stage.groups[0].batch_images, stage.groups[0].image_px, stage.steps, stage.lr) == (2, 64, 9, 0.5)
    assert recipe(replace(plain, seed=3, settings=("seed=4", "lr=0.25"))).seed == 4
