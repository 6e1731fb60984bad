import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from radio_cache.errors import NonFiniteLossError, TrainingError
from radio_cache.reader import Cache
from trainer.checkpoint import Progress, checkpoints, save_checkpoint, telling_what_is_whole
from trainer.loop import train
from trainer.recipe import Recipe
from trainer.train_config import TrainConfig


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path, damage: str
) -> None:
    config = TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=tmp_path / "run")
    train(config)
    weights = (tmp_path / "run/student.safetensors").read_bytes()
    (tmp_path / "run/student.safetensors").unlink()
    last = sorted((tmp_path / "run/checkpoints").glob("step-*.pt"))[-1]
    content = bytearray(last.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        content[:100] = bytes(100)
    last.write_bytes(content)
    said: list[str] = []
    report = train(config, said.append)
    assert (report.steps_before, report.steps) == (6, 8)
    assert any("step-00000008.pt is damaged" in text for text in said)
    assert (tmp_path / "run/student.safetensors").read_bytes() == weights


def test_nothing_is_trained_anew_where_every_checkpoint_is_damaged(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    config = TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=tmp_path / "run")
    train(config)
    for path in checkpoints(tmp_path / "run/checkpoints"):
        path.write_bytes(b"nothing")
    with pytest.raises(TrainingError, match=r"none of the checkpoints in .* can be read"):
        train(config)


def test_a_full_disk_is_named_and_the_last_checkpoint_stays_whole(
    tiny_cache: Cache, tiny_recipe: Recipe, small_disk: Callable[[int], Any]
) -> None:
    disk = small_disk(200_000_000)
    config = TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=disk.path / "run")
    stopped = False

    def fill_up(text: str) -> None:
        nonlocal stopped
        if "steps" in text and not stopped:
            stopped = True
            disk.resize(50_000_000)  # room for one checkpoint of 31 MB, not for two

    with pytest.raises(TrainingError, match=r"the disk of .* is full .*step-00000003\.pt is whole: make room"):
        train(config, fill_up)
    disk.resize(200_000_000)
    assert train(config).steps_before == 3


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    state = {"student": {"a": torch.ones(2), "b": torch.tensor([1.0, math.nan])}, "adaptors": {}}
    with pytest.raises(NonFiniteLossError, match=r"step 3: .* weights 'b' of the student no longer are"):
        save_checkpoint(tmp_path / "checkpoints", state, Progress(3), keep=1)
    assert not (tmp_path / "checkpoints").exists()


def test_a_disk_that_is_full_before_the_first_checkpoint_is_named(
    tiny_cache: Cache, tiny_recipe: Recipe, small_disk: Callable[[int], Any]
) -> None:
    disk = small_disk(100_000_000)

    def fill_up(text: str) -> None:
        disk.resize(100_000)  # what is there, and hardly more

    with pytest.raises(TrainingError, match=r"the disk of .* is full .* there is no checkpoint yet: make room"):
        train(TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=disk.path / "run"), fill_up)


def test_what_the_system_refuses_in_a_run_says_from_where_it_goes_on(tmp_path: Path) -> None:
    (tmp_path / "step-00000007.pt").touch()
    refused = pytest.raises(TrainingError, match=r"No such file .*nowhere'\. step-00000007.pt is whole: cure that")
    with refused, telling_what_is_whole(tmp_path):
        (tmp_path / "nowhere").open()
    with pytest.raises(BrokenPipeError), telling_what_is_whole(tmp_path):
        raise BrokenPipeError


def test_the_best_checkpoint_is_kept_where_files_cannot_be_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", no_links)
    state = {"student": {"a": torch.ones(2)}, "adaptors": {}}
    last = save_checkpoint(tmp_path, state, Progress(3), keep=1, is_best=True)
    assert (tmp_path / "best.pt").read_bytes() == last.read_bytes()
