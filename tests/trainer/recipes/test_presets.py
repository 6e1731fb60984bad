import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from radio_cache.errors import ConfigError
from trainer.recipes.presets import RECIPES, am_radio, find_recipe, quick, radio_v25
from trainer.recipes.recipe import Group, Recipe, override_stages
from trainer.recipes.summary import MAX_LINES, summarise_recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_its_json(name: str) -> None:
    recipe = find_recipe(name)
    assert recipe.name == name
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize("width", [80, 110])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_shown_in_few_lines_and_says_what_we_chose(name: str, width: int) -> None:
    recipe = find_recipe(name)
    text = summarise_recipe(recipe, width=width)
    assert len(text.splitlines()) <= MAX_LINES
    assert f"seed={recipe.seed}" in text
    assert text.count("(not from paper)") == len(recipe.not_from_paper)


def test_a_saved_recipe_is_found_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(override_stages(quick(), lr=0.5).to_json()))
    assert find_recipe(str(path)).stages[0].lr == 0.5


def test_a_recipe_saved_with_earlier_names_of_fields_still_loads() -> None:
    saved = json.loads((Path(__file__).parent / "saved/am-radio-2026-11-30.json").read_text())
    assert "ours" in saved
    recipe = Recipe.from_json(saved)
    assert recipe == am_radio()
    assert recipe.not_from_paper == tuple(saved["ours"])
    assert find_recipe(str(Path(__file__).parent / "saved/am-radio-2026-11-30.json")) == am_radio()


def test_am_radio_has_the_numbers_of_the_paper() -> None:
    recipe = am_radio()
    assert [(stage.steps, stage.lr) for stage in recipe.stages] == [(300_000, 1e-3)] * 2
    assert recipe.stages[0].groups == (Group(teachers=("!sam*",), image_px=256, batch_images=1024),)
    assert [group.image_px for group in recipe.stages[1].groups] == [432, 1024]
    assert [group.batch_images for group in recipe.stages[1].groups] == [32 * 32, 32 * 2]
    assert (recipe.cos_weight, recipe.l1_weight, recipe.normalise, recipe.adaptor_width) == (0.9, 0.1, "none", None)
    assert recipe.images_seen == 300_000 * (1024 + 1024 + 64)


def test_radio_v25_asks_every_teacher_at_low_and_high_resolution() -> None:
    stages = radio_v25().stages
    assert [[group.image_px for group in stage.groups] for stage in stages] == [[256], [432], [432, 1024]]
    assert all(group.teachers == ("*",) for stage in stages for group in stage.groups)


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no recipe is called 'quik'. Did you mean 'quick'\? Known: am-radio, demo"):
        find_recipe("quik")
    assert find_recipe("am_radio") == am_radio()


def test_steps_of_the_whole_run_keep_the_stages_shares() -> None:
    stages = override_stages(radio_v25(), steps=8).stages
    assert [stage.steps for stage in stages] == [4, 2, 2]
    assert [stage.warmup_steps for stage in stages] == [0, 0, 0]
    assert [stage.steps for stage in override_stages(radio_v25(), steps=3).stages] == [1, 1, 1]
    with pytest.raises(ConfigError, match="steps must be at least 1 for each of 3 stages, not 2"):
        override_stages(radio_v25(), steps=2)


def test_one_value_for_groups_that_differ_is_answered_with_the_settings_to_use() -> None:
    with pytest.raises(
        ConfigError, match=r"several image_px.*--set stages\.0\.groups\.0\.image_px=256 --set stages\.1"
    ):
        override_stages(am_radio(), image_px=64)


def test_a_recipe_file_with_an_unknown_or_a_missing_field_is_refused(tmp_path: Path) -> None:
    data = quick().to_json()
    with pytest.raises(ConfigError, match=r"no recipe setting is called 'stagez'\. Did you mean 'stages'"):
        Recipe.from_json({**data, "stagez": 3})
    with pytest.raises(ConfigError, match="the recipe lacks stages"):
        Recipe.from_json({key: value for key, value in data.items() if key != "stages"})
    whole = json.dumps(data).encode()
    for content in (b"{", b"", b"null", b"[]", b"3", b"\xff\xfe", whole[: len(whole) // 2], b"[" * 100_000):
        (tmp_path / "r.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"r\.json is not a recipe in JSON"):
            find_recipe(str(tmp_path / "r.json"))
    (tmp_path / "r.json").write_text(json.dumps({**data, "stagez": 3}))
    with pytest.raises(ConfigError, match=r"r\.json: no recipe setting is called 'stagez'"):
        find_recipe(str(tmp_path / "r.json"))


def test_impossible_recipes_are_refused_by_the_path_of_the_setting() -> None:
    [stage] = quick().stages
    with pytest.raises(ConfigError, match=r"stages\.0\.groups\.0\.rate must be above 0"):
        replace(quick(), stages=(replace(stage, groups=(Group(image_px=32, batch_images=1, rate=0.0),)),))
    with pytest.raises(ConfigError, match="has no stage"):
        replace(quick(), stages=())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"seed": -1}, "seed must be at least 0 and finite, not -1"),
        ({"seed": 1 << 64}, "seed must be at most"),
        ({"teacher_weights": {"clip": -1.0}}, "teacher_weights.clip must be at least 0 and finite, not -1.0"),
        ({"teacher_weights": {"clip": float("nan")}}, "teacher_weights.clip must be at least 0 and finite, not nan"),
        ({"teacher_summary_weights": {"clip": -0.5}}, "teacher_summary_weights.clip must be at least 0"),
        ({"colour_jitter": 1.5}, "colour_jitter must be at most 1, not 1.5"),
        ({"summary_weight": float("inf")}, "summary_weight must be at least 0 and finite, not inf"),
    ],
)
def test_a_number_that_would_train_nonsense_is_refused_by_name(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(quick(), **setting)
