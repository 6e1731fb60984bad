"""The card says what the cache and the run know, and what they do not."""

import json
from pathlib import Path

import pytest
from PIL import Image

from radio_cache.errors import ConfigError
from radio_cache.reader import Cache
from trainer import TrainConfig, train
from trainer.exports import Card, export_student
from trainer.recipes.recipe import Recipe, override_stages


def test_a_card_names_teachers_licences_recipe_results_and_shows_what_the_student_sees(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    train(TrainConfig(cache=tiny_cache.path, recipe=override_stages(tiny_recipe, steps=1), out=tmp_path / "run"))
    rows = [{"name": "student", "kind": "student", "top1": 0.5, "share_of_best_teacher": None}]
    (tmp_path / "knn.json").write_text(json.dumps({"protocol": "k-NN, k = 20", "rows": rows}))
    export_student(tmp_path / "run", tmp_path / "out", card=Card(results=[tmp_path / "knn.json"]))
    text = (tmp_path / "out/README.md").read_text()
    assert "| fake-a | colours | CC0-1.0 | `000000000000` |" in text
    assert "1 steps, 3 images seen" in text
    assert '| summary_loss | `"cosine"` |' in text
    assert "| student | 0.5 |" in text
    assert "model = load_student('.', adaptors=['fake-a', 'fake-b'])" in text
    with Image.open(tmp_path / "out/features.png") as picture:
        assert picture.size == (4 * 192 + 3 * 4, 2 * 192 + 4)


def test_a_card_without_cache_recipe_or_picture_says_so(make_run, tmp_path: Path) -> None:
    export_student(make_run(), tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert "The cache could not be read when this card was written" in text
    assert "| sam.b | not known here |" in text
    assert "The recipe is not beside the weights" in text
    assert "features.png" not in text
    assert not (tmp_path / "out/features.png").exists()


def test_pictures_of_ones_own_may_be_shown_and_files_that_are_none_are_refused(make_run, tmp_path: Path) -> None:
    run = make_run()
    Image.new("RGB", (30, 20), (9, 99, 200)).save(tmp_path / "mine.png")
    export_student(run, tmp_path / "out", card=Card(pictures=[tmp_path / "mine.png"]))
    assert (tmp_path / "out/features.png").exists()
    with pytest.raises(ConfigError, match=r"--picture: .*no.png"):
        export_student(run, tmp_path / "other", card=Card(pictures=[tmp_path / "no.png"]))
    with pytest.raises(ConfigError, match="is no JSON file of radio-eval with rows"):
        export_student(run, tmp_path / "other", card=Card(results=[tmp_path / "mine.png"]))
    assert not (tmp_path / "other").exists()
