"""Runs that start from a finished student, or from weights that timm publishes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from radio_cache.errors import ConfigError
from radio_cache.reader import Cache
from trainer import TrainConfig, load_student, train
from trainer.cli import main as train_main
from trainer.exports import Card, export_student
from trainer.model.files import start_from
from trainer.recipes.recipe import Recipe, override_stages
from trainer.students import create_student

SMALL_VIT = {"width": 24, "depth": 2, "heads": 2, "num_summary_tokens": 1}


def started(cache: Cache, out: Path, *arguments: str) -> Result:
    sizes = ["--batch-size", "2", "--steps", "1", "--image-size", "32", "--device", "cpu"]
    return CliRunner().invoke(train_main, ["--cache", str(cache.path), "--out", str(out), *sizes, *arguments])


def finished(cache: Cache, recipe: Recipe, out: Path, **changes: object) -> Path:
    train(TrainConfig(cache=cache.path, recipe=replace(override_stages(recipe, steps=2), **changes), out=out))
    return out


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("exported", [False, True])
def test_a_run_starts_with_the_weights_of_a_finished_student_and_says_so(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path, exported: bool
) -> None:
    start = finished(tiny_cache, tiny_recipe, tmp_path / "first", student="vit-tiny-16", student_overrides=SMALL_VIT)
    if exported:
        export_student(start, tmp_path / "export", card=Card(pictures=()))
        start = tmp_path / "export"
    result = started(tiny_cache, tmp_path / "second", "--init", str(start), "--lr", "1e-9")
    assert result.exit_code == 0, result.output
    recorded = json.loads((tmp_path / "second/recipe.json").read_text())
    assert (recorded["student"], recorded["init"]) == ("vit-tiny-16", str(start))
    assert recorded["student_overrides"]["width"] == 24
    second = load_student(tmp_path / "second")
    for name, value in load_student(start).student.state_dict().items():
        torch.testing.assert_close(second.student.state_dict()[name], value, rtol=0, atol=1e-6)
    assert_same_weights(load_student(tmp_path / "second", untrained=True).student, load_student(start).student)
    again = started(tiny_cache, tmp_path / "second", "--init", str(start), "--lr", "1e-9")
    assert "is finished" in again.output


def test_a_run_that_was_started_goes_on_without_the_student_it_started_from(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    start = finished(tiny_cache, tiny_recipe, tmp_path / "first")
    finished(tiny_cache, tiny_recipe, tmp_path / "second", init=str(start))
    start.rename(tmp_path / "elsewhere")
    recipe = replace(override_stages(tiny_recipe, steps=2), init=str(start))
    assert train(TrainConfig(cache=tiny_cache.path, recipe=recipe, out=tmp_path / "second")).was_finished
    with pytest.raises(ConfigError, match=r"--init .*first.*holds no trained student"):
        load_student(tmp_path / "second", untrained=True)


def test_reparametrised_weights_stand_for_those_of_the_start(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    start = finished(tiny_cache, tiny_recipe, tmp_path / "first", student="vit-tiny-16", student_overrides=SMALL_VIT)
    student = create_student(
        "vit-tiny-16", **SMALL_VIT, spectral_reparam=True, train_windows=[2], window_probability=0.5
    )
    start_from(student, start)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            student.eval()(images).spatial, load_student(start)(images).spatial, rtol=1e-4, atol=1e-5
        )


def test_what_cannot_be_started_from_is_said_before_anything_is_written(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    start = finished(tiny_cache, tiny_recipe, tmp_path / "first", student="vit-tiny-16", student_overrides=SMALL_VIT)
    for arguments, words in (
        (["--init", str(tmp_path / "nothing")], "holds no finished student"),
        (["--init", str(start), "--pretrained"], "exclude each other"),
        (["--init", str(start), "--student", "e-radio-tiny"], "is another network than 'e-radio-tiny' here"),
        (["--init", str(start), "--set", "student_overrides.width=48"], "is another network"),
        (["--pretrained", "--student", "vit-tiny-16"], "is no model of timm, and has no weights of its own"),
    ):
        result = started(tiny_cache, tmp_path / "second", *arguments)
        assert result.exit_code == 1, result.output
        assert isinstance(result.exception, SystemExit)
        assert words in result.output
        assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    "arguments", [["--pretrained"], ["--set", "student_overrides.pretrained=true"]], ids=["flag", "setting"]
)
def test_pretrained_weights_that_cannot_be_fetched_are_one_sentence_with_the_cure(
    tiny_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise ConnectionError("[Errno -2] Name or service not known\nand forty lines more")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", no_network)
    result = started(tiny_cache, tmp_path / "run", "--student", "timm:resnet10t", *arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), "a traceback"
    assert (
        "the pretrained weights of timm's 'resnet10t' are not available: ConnectionError: [Errno -2]" in result.output
    )
    assert "student_overrides.init_file=FILE" in result.output
    assert not (tmp_path / "run").exists()


def test_pretrained_starts_with_what_timm_publishes(
    tiny_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    published = timm.create_model("resnet10t").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(published))
    result = started(tiny_cache, tmp_path / "run", "--student", "timm:resnet10t", "--pretrained", "--lr", "1e-9")
    assert result.exit_code == 0, result.output
    weights = load_student(tmp_path / "run").student.state_dict()
    torch.testing.assert_close(weights["net.conv1.0.weight"], published["conv1.0.weight"], rtol=0, atol=1e-6)
