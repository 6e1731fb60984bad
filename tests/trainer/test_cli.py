import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from radio_cache.reader import Cache
from radio_cache.testing import make_tiny_cache, write_images
from trainer import loop
from trainer.cli import main
from trainer.model import files as export
from trainer.recipes.auto import auto_recipe
from trainer.recipes.presets import RECIPES, quick
from trainer.run import step as training_run
from trainer.students import STUDENTS, create_student

SMALL = ["--image-size", "32", "--steps", "2", "--batch-size", "2", "--set", "adaptor_width=8", "--device", "cpu"]


def test_a_run_ends_with_its_losses_and_the_next_commands(tiny_cache: Cache, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = CliRunner().invoke(main, ["--cache", str(tiny_cache.path), "--out", str(out), *SMALL])
    assert result.exit_code == 0, result.output
    assert "fake-a" in result.output
    assert f"Next: radio-eval knn --run {out}" in result.output
    assert "student e-radio-tiny: 2.6 M parameters" in result.output
    again = CliRunner().invoke(main, ["--cache", str(tiny_cache.path), "--out", str(out), *SMALL])
    assert again.exit_code == 0, again.output
    assert "run is finished: all its 2 steps were done before, and nothing was done now." in again.output.replace(
        "\n", " "
    )
    assert "choose another --out, or remove that folder" in again.output.replace("\n", " ")
    assert "steps/s" not in again.output


def test_ctrl_c_outside_of_the_steps_says_where_the_run_stands(
    tiny_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--cache", str(tiny_cache.path), "--out", str(tmp_path / "run"), *SMALL]

    def stopped_in(owner: object, name: str) -> str:
        def stop(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop)
            result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 130
        return result.output

    assert "stopped. Nothing was written yet." in stopped_in(training_run, "build_distilled")
    assert "stopped. No checkpoint was saved yet: the same command starts again" in stopped_in(loop, "restore_last")
    assert "stopped. step-00000002.pt is complete: the same command resumes from it." in stopped_in(export, "save")
    assert not [file for file in (tmp_path / "run").iterdir() if file.name.startswith("student.")]
    assert "stopped. step-00000002.pt is complete: the same command resumes" in stopped_in(loop, "restore_last")
    assert CliRunner().invoke(main, arguments).exit_code == 0


def test_the_next_command_suits_the_images_and_can_be_copied(tmp_path: Path) -> None:
    write_images(tmp_path / "images", classes=["all"], per_class=4)
    cache = make_tiny_cache(tmp_path / "c.zarr", tmp_path / "images")
    out = tmp_path / "my run"
    result = CliRunner().invoke(main, ["--cache", str(cache.path), "--out", str(out), *SMALL])
    assert result.exit_code == 0, result.output
    assert f"Next: radio-eval rank --run '{out}'" in result.output
    assert "radio-eval knn" not in result.output


def test_errors_come_before_the_recipe(tiny_cache: Cache, tmp_path: Path) -> None:
    arguments = ["--cache", str(tiny_cache.path), "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(main, [*arguments, *SMALL, "--teacher", "nobody"])
    assert result.exit_code == 1
    assert "no cached teacher is called 'nobody'" in result.output
    assert "recipe quick" not in result.output
    assert "recipe quick" in CliRunner().invoke(main, [*arguments, *SMALL]).output


def test_students_are_listed_before_anything_else_is_asked_for() -> None:
    result = CliRunner().invoke(main, ["--student", "help"])
    assert result.exit_code == 0, result.output
    assert set(STUDENTS) <= set(result.output.split())
    [line] = [line for line in result.output.splitlines() if line.startswith("vit-tiny-16 ")]
    student = create_student("vit-tiny-16")
    assert f"{sum(one.numel() for one in student.parameters()) / 1e6:.1f} M" in line
    assert "16 px" in line


def test_recipes_are_listed_with_what_they_are_for() -> None:
    result = CliRunner().invoke(main, ["--recipe", "help"])
    assert result.exit_code == 0, result.output
    assert set(RECIPES) <= set(result.output.split())
    assert "RADIOv2.5" in result.output


def test_the_weights_of_a_run_can_be_read_by_whom_its_other_files_can(tiny_cache: Cache, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = CliRunner().invoke(main, ["--cache", str(tiny_cache.path), "--out", str(run), *SMALL])
    assert result.exit_code == 0, result.output
    weights, settings = run / "student.safetensors", run / "student.json"
    assert weights.stat().st_mode == settings.stat().st_mode


def test_errors_are_one_message_without_a_traceback(tiny_cache: Cache, tmp_path: Path) -> None:
    def output(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["--out", str(tmp_path / "run"), *arguments])
        assert result.exit_code == 1
        assert "Traceback" not in result.output
        return result.output

    cache = ["--cache", str(tiny_cache.path)]
    assert "no student is called 'e-radio-tinny'. Did you mean 'e-radio-tiny'" in output(
        *cache, "--student", "e-radio-tinny"
    )
    assert "--set lr: write it as KEY=VALUE" in output(*cache, "--set", "lr")
    assert "is a folder, but not a radio-cache store" in output("--cache", str(tmp_path))
    assert "does not exist" in output("--cache", str(tmp_path / "nowhere.zarr"))
    assert "--device cuda:99 cannot be used here" in output(*cache, "--device", "cuda:99")
    assert not (tmp_path / "run").exists()


def test_a_run_that_says_nothing_gets_settings_that_suit_cache_and_student(tiny_cache: Cache) -> None:
    [stage] = auto_recipe(quick(), tiny_cache, (), "vit-tiny-16", "cpu").stages
    assert stage.groups[0].image_px == 32  # the teachers' largest input; the student's own is 96
    assert stage.groups[0].batch_images == 8
    assert stage.steps == 25_600 // 8
    assert auto_recipe(quick(), tiny_cache, (), None, "cpu", batch_images=2).steps == 25_600 // 2
    short = auto_recipe(quick(), tiny_cache, (), None, "cpu", steps=30)
    assert (short.steps, short.stages[0].warmup_steps, short.log_every) == (30, 1, 1)
    assert stage.lr < auto_recipe(quick(), tiny_cache, (), "e-radio-tiny", "cpu").stages[0].lr


def test_the_recipe_is_shown_before_training_and_another_student_drops_its_settings(
    tiny_cache: Cache, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = ["--cache", str(tiny_cache.path), "--out", str(out), "--recipe", "am_radio", "--student", "e-radio-tiny"]
    for setting in (
        "stages.0.groups.0.image_px=32",
        "stages.0.groups.0.batch_images=2",
        "stages.1.groups.0.image_px=64",
        "stages.1.groups.0.batch_images=2",
        "stages.1.groups.1.image_px=32",
        "stages.1.groups.1.batch_images=2",
        "stages.1.groups.1.teachers=fake-b",
        "adaptor_width=8",
    ):
        command += ["--set", setting]
    result = CliRunner().invoke(main, [*command, "--steps", "4", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "stage 1 'with SAM': 2 steps" in result.output
    assert "(not from paper)" in result.output
    assert "window_probability" not in result.output
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["teachers"].keys() == {"fake-a", "fake-b"}
    result = CliRunner().invoke(
        main, ["--cache", str(tiny_cache.path), "--out", str(tmp_path / "x"), "--recipe", "am-radio"]
    )
    assert "stages.1.groups.1 asks for teachers sam*, and there are fake-a, fake-b" in result.output
