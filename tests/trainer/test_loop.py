import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from radio_cache.errors import (
    ConfigError,
    MissingRowsError,
    NonFiniteLossError,
    NotACacheError,
    StoreError,
    TrainingError,
)
from radio_cache.reader import Cache
from trainer.cli import loss_table
from trainer.data.batch import Targets
from trainer.data.waits import Waits
from trainer.distributed.processes import Processes
from trainer.loop import train
from trainer.model.files import load_student
from trainer.monitoring.metrics import MetricsLog, StepLosses
from trainer.recipes.recipe import Recipe, override_stages
from trainer.run.folder import claim_run_folder, lock_run_folder
from trainer.run.lr_schedule import lr_at
from trainer.run.step import TrainingRun
from trainer.train_config import TrainConfig


def losses_of(run: Path) -> list[dict[str, object]]:
    """What was logged, without the timings."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("step", "loss", "lr", "teachers")} for line in lines]


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = load_file(one / "student.safetensors"), load_file(other / "student.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_training_brings_the_losses_down_and_leaves_a_student(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = replace(override_stages(tiny_recipe, steps=40), log_every=5)
    report = train(TrainConfig(cache=tiny_cache.path, recipe=recipe, out=tmp_path / "run"))
    assert (report.steps, report.steps_before, report.stopped) == (40, 0, False)
    lines = losses_of(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(5, 41, 5))
    first, last = lines[0]["loss"], lines[-1]["loss"]
    assert isinstance(first, float)
    assert isinstance(last, float)
    assert last < 0.8 * first
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "recipe.json",
        "run.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "student.json",
        "student.safetensors",
        "statistics.safetensors",
    }
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 2


def test_two_runs_give_the_same_weights_and_another_seed_others(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    for name, recipe, threads in (("a", tiny_recipe, 1), ("b", tiny_recipe, 3), ("c", replace(tiny_recipe, seed=1), 1)):
        train(TrainConfig(cache=tiny_cache.path, recipe=recipe, out=tmp_path / name, data_threads=threads))
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")
    assert losses_of(tmp_path / "a") != losses_of(tmp_path / "c")


def test_a_run_stopped_by_sigterm_goes_on_to_the_same_weights(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=whole))
    config = TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=cut)
    seen: list[str] = []
    # The only sentence of a new run is said just before the loop; a signal sent then arrives in one of its first steps.
    timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGTERM))

    def on_message(text: str) -> None:
        seen.append(text)
        timer.start()

    report = train(config, on_message=on_message)
    assert report.stopped
    assert 0 < report.steps < tiny_recipe.steps
    assert not (cut / "student.safetensors").exists()
    report = train(config, on_message=seen.append)
    assert not report.stopped
    assert any("going on from step-" in text for text in seen)
    assert_same_weights(whole, cut)
    assert losses_of(whole)[-1] == losses_of(cut)[-1]


def test_a_run_killed_at_any_moment_goes_on_to_the_same_weights(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = replace(override_stages(tiny_recipe, steps=24), checkpoint_every=2, log_every=4)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(TrainConfig(cache=tiny_cache.path, recipe=recipe, out=whole))
    command = [
        sys.executable,
        "-c",
        "from trainer.cli import main; main()",
        "--cache",
        str(tiny_cache.path),
        "--out",
        str(cut),
    ]
    command += ["--recipe", str(whole / "recipe.json"), "--device", "cpu"]
    # One thread, as in this process: sums over threads round differently.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    kills = 0
    for wait_for in (4, 12):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not any(
            int(p.stem[5:]) >= wait_for for p in (cut / "checkpoints").glob("step-*.pt")
        ):
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills == 2
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert_same_weights(whole, cut)
    assert losses_of(whole) == losses_of(cut)


def test_a_run_in_bfloat16_with_averaged_weights_goes_on_to_the_same_weights(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = replace(tiny_recipe, precision="bfloat16", ema=0.8, balancing="adaloss")
    config = TrainConfig(cache=tiny_cache.path, recipe=recipe, out=tmp_path / "run")
    train(config)
    (tmp_path / "run").rename(tmp_path / "whole")
    train(config)
    (tmp_path / "run/student.safetensors").unlink()
    (tmp_path / "run/checkpoints/step-00000008.pt").unlink()
    assert train(config).steps_before == 6
    assert_same_weights(tmp_path / "whole", tmp_path / "run")
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "run")


def test_smaller_passes_and_blocks_computed_twice_change_no_loss(
    tiny_cache: Cache, two_groups: Recipe, tmp_path: Path
) -> None:
    less_memory = replace(two_groups, accumulate=2, checkpoint_activations=True)
    for name, recipe in (("plain", two_groups), ("less-memory", less_memory)):
        train(TrainConfig(cache=tiny_cache.path, recipe=recipe, out=tmp_path / name))
    for plain, less in zip(losses_of(tmp_path / "plain"), losses_of(tmp_path / "less-memory"), strict=True):
        assert less["loss"] == pytest.approx(plain["loss"], rel=1e-4)


def test_a_run_folder_with_other_settings_is_refused_by_name(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    train(TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"holds a run with other settings: recipe.stages.0.lr was 0.002, now 0.5"):
        train(TrainConfig(cache=tiny_cache.path, recipe=override_stages(tiny_recipe, lr=0.5), out=tmp_path / "run"))


def test_a_run_does_not_go_on_with_other_images(tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path) -> None:
    receipt = min((tiny_cache.path / "receipts/fake-a").iterdir())
    receipt.rename(tmp_path / "receipt")
    config = TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=tmp_path / "run", allow_partial=True)
    train(config)
    (tmp_path / "receipt").rename(receipt)
    with pytest.raises(ConfigError, match=r"holds a run with other settings: images.used was 3, now 7"):
        train(config)


def test_a_run_begun_with_earlier_names_of_fields_goes_on(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    config = TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=tmp_path / "run")
    train(config)
    run_file = tmp_path / "run/run.json"
    recorded = json.loads(run_file.read_text())
    recorded["recipe"]["ours"] = recorded["recipe"].pop("not_from_paper")
    run_file.write_text(json.dumps(recorded))
    assert train(config).was_finished


def test_an_output_that_is_something_else_is_refused(tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/thesis.tex").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(NotACacheError, match="exists and is not a run of radio-train"):
            train(TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=tmp_path / name))
    assert (tmp_path / "folder/thesis.tex").read_text() == "mine"
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/recipe.json").write_text("{}")
    train(TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=tmp_path / "begun"))


def test_a_run_whose_folder_is_taken_away_stops_and_makes_no_half_of_it(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, trained = tmp_path / "run", TrainingRun.step

    def step(self: TrainingRun, number: int, *rest: Any) -> Any:
        if number == 4:
            run.rename(tmp_path / "elsewhere")
        return trained(self, number, *rest)

    monkeypatch.setattr(TrainingRun, "step", step)
    with pytest.raises(
        TrainingError, match=r"the run's folder .*run was removed or renamed while it was being trained"
    ):
        train(TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=run))
    assert not run.exists()


def test_a_run_is_trained_by_one_start_at_a_time_even_if_the_other_was_orphaned(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    config = TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=tmp_path / "run")
    train(config)
    (tmp_path / "run/student.safetensors").unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with (
        lock_run_folder(tmp_path / "run"),
        pytest.raises(TrainingError, match=r"run is being trained by another process .*run\.json"),
    ):
        train(config)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    assert train(config).steps_before == 8


def test_of_many_starts_at_once_one_owns_the_folder(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """And what is in it is the owner's alone: not the settings of one beside the recipe of another."""
    for attempt in range(20):
        out, ready, done = tmp_path / f"run{attempt}", threading.Barrier(6), threading.Barrier(6)
        owners: list[int] = []
        refused: list[str] = []

        def start(
            seed: int,
            out: Path = out,
            ready: Any = ready,
            done: Any = done,
            owners: list[int] = owners,
            refused: list[str] = refused,
        ) -> None:
            ready.wait()
            try:
                with claim_run_folder(out, replace(tiny_recipe, seed=seed % 2), "cache", ["a"], {}):
                    owners.append(seed % 2)
                    done.wait()
            except (TrainingError, ConfigError) as exc:
                refused.append(str(exc))
                done.wait()

        threads = [threading.Thread(target=start, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert len(owners) == 1, refused
        assert len(refused) == 5
        assert all("is being trained by another process" in text or "with other settings" in text for text in refused)
        assert sorted(path.name for path in out.iterdir()) == ["recipe.json", "run.json"]
        for content in ((out / "recipe.json"), (out / "run.json")):
            data = json.loads(content.read_text())
            assert data.get("recipe", data)["seed"] == owners[0]


def test_a_start_killed_at_its_first_files_goes_on(tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json.tmp-0123").write_text("{")
    config = TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=run)
    train(config)
    (run / "recipe.json").unlink()
    assert train(config).was_finished
    assert (run / "recipe.json").exists()


def test_a_run_killed_between_weights_and_configuration_is_finished_by_the_same_command(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    config = TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=tmp_path / "run")
    train(config)
    whole = {name: (tmp_path / "run" / name).read_bytes() for name in ("student.safetensors", "student.json")}
    (tmp_path / "run/student.json").unlink()
    with pytest.raises(NotACacheError, match="the run is not finished: continue it with the same radio-train command"):
        load_student(tmp_path / "run")
    report = train(config)
    assert (report.steps_before, report.was_finished) == (8, False)
    assert {name: (tmp_path / "run" / name).read_bytes() for name in whole} == whole
    assert train(config).was_finished


RUN_FILES = [
    b"{}",
    b"",
    b"null",
    b"[1]",
    b"\xff\xfe",
    b'{"cache": 3}',
    b'{"recipe": null, "cache": "", "teachers": []}',
    b'{"recipe": {}, "cache": "", "te',
    b"[" * 9999,
]


@pytest.mark.parametrize("content", RUN_FILES)
def test_a_run_file_that_is_torn_or_odd_is_named(tiny_recipe: Recipe, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "run.json"
    file.write_bytes(content)
    damaged = pytest.raises(
        ConfigError, match=r"run\.json is damaged \(.*\): restore it from a copy, or choose another"
    )
    with damaged, claim_run_folder(tmp_path, tiny_recipe, "cache", ["a"], {}):
        pass
    assert file.read_bytes() == content


LOGS = [
    b"",
    b"\xff\xfe\x00",
    b"3\nnull\n[]\n",
    b'{"step": "many"}\n',
    b'{"step": 2, "teachers": 5}\n',
    b'{"step": 2, "tea',
]


@pytest.mark.parametrize("log", LOGS)
def test_a_log_that_is_torn_or_odd_stops_no_run(tmp_path: Path, log: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(log)
    assert loss_table(tmp_path) is None
    with MetricsLog(tmp_path, 3, {}, ["a"]) as lines:
        lines.add(StepLosses(1.0, {"a": {"spatial": 0.5}}), Waits(), 4)
        lines.write(4, 1e-3, {})
    assert [line["step"] for line in losses_of(tmp_path)] == [4]
    assert loss_table(tmp_path) is not None


def test_an_unknown_teacher_is_answered_with_the_cached_ones(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"no cached teacher is called 'fake-c'\. Did you mean 'fake-[ab]'"):
        train(TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=tmp_path / "run", teachers=("fake-c",)))
    assert not (tmp_path / "run").exists()


def test_an_illegal_image_size_names_the_nearest(tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"image_px=50: student 'e-radio-tiny' takes 64 as the nearest; --set stages\.0\.groups\.0\.image_px=64",
    ):
        train(
            TrainConfig(cache=tiny_cache.path, recipe=override_stages(tiny_recipe, image_px=50), out=tmp_path / "run")
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_overrides": {"depths": [1, 1]}}, r"depths are 4 whole numbers of at least 0, got \[1, 1\]"),
        ({"student_overrides": {"drop_path": 2}}, r"drop_path is in \[0, 1\), got 2"),
        ({"student_overrides": {"width": "wide"}}, r"e-radio-tiny.*"),
        ({"student_overrides": {"stem_width": -1}}, r"student 'e-radio-tiny' cannot be made with the settings"),
        ({"teacher_weights": {"fake-a": 0.0, "fake-b": 0.0}}, r"all losses of fake-a, fake-b weigh 0"),
    ],
)
def test_settings_that_make_no_network_or_train_nothing_are_refused(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(TrainConfig(cache=tiny_cache.path, recipe=replace(tiny_recipe, **change), out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_cache_without_teachers_says_how_to_get_one(tmp_path: Path, tiny_recipe: Recipe) -> None:
    from radio_cache.testing import make_tiny_cache, write_images

    write_images(tmp_path / "images")
    cache = make_tiny_cache(tmp_path / "c.zarr", tmp_path / "images", teachers={"only": (3, 4)})
    import shutil

    shutil.rmtree(cache.path / "teachers/only")
    with pytest.raises(StoreError, match=r"holds no teacher yet: radio-cache build"):
        train(TrainConfig(cache=cache.path, recipe=tiny_recipe, out=tmp_path / "run"))


@pytest.mark.parametrize("change", ["moved away", "others"])
def test_images_that_are_gone_or_others_stop_a_run_before_it_begins(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path, change: str
) -> None:
    folder = Path(tiny_cache.meta.containers[0].path)
    if change == "moved away":
        folder.rename(folder.with_name("elsewhere"))
    else:
        for file in folder.rglob("*.png"):
            file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(TrainingError, match=rf"({folder}).*put them back, or build a cache of those that are there"):
        train(TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_on_part_of_a_cache_says_how_much(tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path) -> None:
    min((tiny_cache.path / "receipts/fake-a").iterdir()).unlink()
    said: list[str] = []
    config = TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=tmp_path / "run", allow_partial=True)
    with pytest.raises(
        MissingRowsError, match=r"'fake-a' has seen 4 of 8 images: .* or train on what is there with --allow"
    ):
        train(replace(config, allow_partial=False))
    train(config, said.append)
    assert "\n3 of 8 images, 8 steps" in said[0]


def test_a_loss_that_is_not_finite_names_teacher_step_and_images(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = replace(override_stages(tiny_recipe, lr=1e30, warmup_steps=0), clip_grad_norm=1e30)
    with pytest.raises(
        NonFiniteLossError,
        match=r"step \d+: the loss of teacher 'fake-[ab]' is (nan|inf), on 3 of 3 images: \w+/\d.png, .* try a lower --lr",
    ):
        train(TrainConfig(cache=tiny_cache.path, recipe=recipe, out=tmp_path / "run"))


def test_the_one_image_whose_loss_is_not_finite_is_named(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    run = TrainingRun(TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=tmp_path / "run"), Processes())
    with run.loader(0) as loader:
        loaded = next(iter(loader))
        targets = loaded.batch.teachers[1]
        assert isinstance(targets, Targets)
        targets.spatial[2] = math.nan
        key = run.cache.index.key(int(loaded.batch.rows[2]))
        with pytest.raises(
            NonFiniteLossError, match=rf"step 0: .* teacher 'fake-b' is nan, on 1 of 3 images: {key}\. "
        ):
            run.step(0, iter([loaded]))


def test_the_rate_warms_up_and_falls_to_zero(tiny_recipe: Recipe) -> None:
    [stage] = override_stages(tiny_recipe, lr=1.0, steps=104, warmup_steps=4).stages
    rates = [lr_at(step, stage) for step in range(stage.steps)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[54] == pytest.approx(0.5)
    assert rates[-1] < 1e-3
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_a_vit_gives_each_summary_teacher_its_own_token(tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(tiny_recipe, student="vit-tiny-16", student_overrides={"num_summary_tokens": 1})
    recipe = override_stages(recipe, steps=2)
    train(TrainConfig(cache=tiny_cache.path, recipe=recipe, out=tmp_path / "run"))
    assert (tmp_path / "run/student.safetensors").exists()
