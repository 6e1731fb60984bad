"""The examples of CONTRIBUTING.md: a recipe and a student, each of one file, are run as they stand there."""

import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from radio_cache.reader import Cache
from trainer.cli import main
from trainer.model.files import load_student
from trainer.recipes import presets
from trainer.recipes.recipe import Recipe


def example(heading: str) -> str:
    """The code block below a heading of CONTRIBUTING.md."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [section] = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    [code] = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return code


def test_the_recipe_of_contributing_is_found_listed_and_trained(
    tiny_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "RECIPES", dict(presets.RECIPES))
    exec(example("Adding a recipe"), {})
    recipe = presets.find_recipe("two_sizes")
    assert Recipe.from_json(recipe.to_json()) == recipe
    out = tmp_path / "run"
    arguments = ["--cache", str(tiny_cache.path), "--out", str(out), "--recipe", "two-sizes", "--steps", "4"]
    for setting in ("adaptor_width=8", "stages.0.groups.0.batch_images=2", "stages.1.groups.0.batch_images=2"):
        arguments += ["--set", setting]
    result = CliRunner().invoke(main, [*arguments, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "rate 0.0005 (not from paper)" in result.output
    assert (out / "student.safetensors").exists()


def test_the_student_of_contributing_is_trained_and_loaded(
    tiny_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_file.py").write_text(example("Adding a student"))
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "run"
    arguments = ["--cache", str(tiny_cache.path), "--out", str(out), "--student", "torch-module:my_file:PatchMixer"]
    arguments += ["--set", "student_overrides.depth=3", "--set", "adaptor_width=8", "--image-size", "32"]
    result = CliRunner().invoke(main, [*arguments, "--steps", "2", "--batch-size", "2", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    student = load_student(out, allow_modules=["my_file"])
    assert student.student.patch_size == 16
    monkeypatch.delitem(sys.modules, "my_file")
