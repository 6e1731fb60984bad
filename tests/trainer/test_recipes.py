import json
from dataclasses import replace
from pathlib import Path

import pytest

from radio_cache.errors import ConfigError
from trainer.recipes import RECIPES, Recipe, am_radio, find_recipe, quick, with_settings


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_its_json(name: str) -> None:
    recipe = find_recipe(name)
    assert recipe.name == name
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_a_saved_recipe_is_found_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(replace(quick(), lr=0.5).to_json()))
    assert find_recipe(str(path)).lr == 0.5


def test_am_radio_has_the_numbers_of_the_paper() -> None:
    recipe = am_radio()
    assert (recipe.steps, recipe.batch_images, recipe.image_px, recipe.lr) == (300_000, 1024, 256, 1e-3)
    assert (recipe.cos_weight, recipe.l1_weight, recipe.normalise, recipe.adaptor_width) == (0.9, 0.1, "none", None)


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"no recipe is called 'quik'. Did you mean 'quick'\? Known: am-radio, demo, quick"
    ):
        find_recipe("quik")


def test_settings_are_typed_by_their_field() -> None:
    changed = with_settings(
        quick(),
        {
            "lr": "1e-4", "steps": "7", "crop_area": "0.5,1", "normalise": "none", "adaptor_width": "none",
            "channels_last": "false", "student_overrides.depths": "[1, 1, 1, 1]", "teacher_weights.sam": "0.5",
        },
    )  # fmt: skip
    assert (changed.lr, changed.steps, changed.crop_area, changed.normalise) == (1e-4, 7, (0.5, 1.0), "none")
    assert changed.adaptor_width is None
    assert changed.channels_last is False
    assert changed.student_overrides == {"depths": [1, 1, 1, 1]}
    assert changed.teacher_weights == {"sam": 0.5}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_image", "3", "no recipe setting is called 'batch_image'. Did you mean 'batch_images'"),
        ("steps", "many", "--set steps=many: 'many' is not a int"),
        ("steps", "1.5", "--set steps=1.5"),
        ("steps", "true", "--set steps=true"),
        ("steps", "0", "steps must be at least 1, not 0"),
        ("lr", "-1", "lr must be above 0"),
        ("crop_area", "0.9,0.1", "crop_area must be two rising numbers"),
        ("crop_area", "0.5", "--set crop_area=0.5"),
        ("normalise", "phi", "--set normalise=phi"),
        ("steps.x", "1", "'steps' is one value"),
        ("name", "x", "no recipe setting is called 'name'"),
    ],
)
def test_a_bad_setting_is_named(key: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        with_settings(quick(), {key: value})
    assert message in str(error.value)


def test_a_recipe_file_with_an_unknown_or_a_missing_field_is_refused(tmp_path: Path) -> None:
    data = quick().to_json()
    with pytest.raises(ConfigError, match=r"no recipe setting is called 'stepz'\. Did you mean 'steps'"):
        Recipe.from_json({**data, "stepz": 3})
    with pytest.raises(ConfigError, match="the recipe lacks lr"):
        Recipe.from_json({key: value for key, value in data.items() if key != "lr"})
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(ConfigError, match="is not a recipe in JSON"):
        find_recipe(str(tmp_path / "r.json"))
