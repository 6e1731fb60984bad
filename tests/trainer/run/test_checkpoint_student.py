"""Students out of checkpoints: the best, the last, one of a step, of runs that are finished and of runs that are not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from radio_cache.errors import ConfigError, NotACacheError
from radio_cache.testing import make_tiny_cache, write_images
from trainer.export_cli import main as export_main
from trainer.loop import train
from trainer.model.files import load_student
from trainer.recipes.recipe import Recipe, override_stages
from trainer.run.checkpoint_student import student_from_checkpoint
from trainer.train_config import TrainConfig


@pytest.fixture
def run(tmp_path: Path, tiny_recipe: Recipe) -> Path:
    """A run with averaged weights, k-NN at its second, fourth and last step, and checkpoints of the last two."""
    write_images(tmp_path / "images", per_class=8)
    cache = make_tiny_cache(tmp_path / "c.zarr", tmp_path / "images")
    recipe = replace(override_stages(tiny_recipe, steps=6), knn_every=2, ema=0.9, normalise="zca", checkpoint_every=3)
    train(TrainConfig(cache=cache.path, recipe=recipe, out=tmp_path / "run"))
    return tmp_path / "run"


def test_the_last_checkpoint_gives_the_student_that_the_run_ended_with(run: Path) -> None:
    expected = load_student(run, adaptors="all")
    student, said = student_from_checkpoint(run, "last", adaptors="all")
    assert said == "step-00000006.pt: step 6 of 6"
    assert student.config == expected.config
    state = expected.state_dict()
    assert student.state_dict().keys() == state.keys()
    for name, weights in student.state_dict().items():
        torch.testing.assert_close(weights, state[name], msg=lambda text, name=name: f"{name}: {text}")


def test_a_run_that_was_stopped_early_is_exported_and_the_best_says_how_good_it_is(run: Path, tmp_path: Path) -> None:
    (run / "student.safetensors").unlink()
    with pytest.raises(NotACacheError, match="radio-export --checkpoint last"):
        load_student(run)
    arguments = ["--run", str(run), "--no-picture", "--out"]
    result = CliRunner().invoke(export_main, [*arguments, str(tmp_path / "best"), "--checkpoint", "best"])
    assert result.exit_code == 0, result.output
    best = torch.load(run / "checkpoints/best.pt", weights_only=True)
    assert f"best.pt: step {best['step']} of 6, k-NN {best['best']:.1%} ± {best['best_error']:.1%}" in result.output
    assert json.loads((tmp_path / "best/student.json").read_text())["steps"] == best["step"]
    load_student(tmp_path / "best", adaptors="all")(torch.rand(1, 3, 32, 32))
    result = CliRunner().invoke(export_main, [*arguments, str(tmp_path / "three"), "--checkpoint", "5"])
    assert result.exit_code == 1
    assert "--checkpoint 5: " in result.output
    assert "6, and takes 'best' and 'last'" in result.output
    (run / "checkpoints/best.pt").unlink()
    result = CliRunner().invoke(export_main, [*arguments, str(tmp_path / "none"), "--checkpoint", "best"])
    assert "has no best checkpoint" in result.output
    assert not (tmp_path / "none").exists()


def test_other_images_and_no_run_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(NotACacheError, match="holds no checkpoint"):
        student_from_checkpoint(tmp_path, "last")
    recorded = json.loads((run / "run.json").read_text())
    recorded["images"]["in_cache"] = 3
    (run / "run.json").write_text(json.dumps(recorded))
    with pytest.raises(ConfigError, match=r"has other images than when .* \(3 then, 16 now\)"):
        student_from_checkpoint(run, "last")
