"""Weights & Biases by a stand-in module: nothing is sent, and nothing need be installed."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from radio_cache.errors import ConfigError
from radio_cache.reader import Cache
from trainer.loop import train
from trainer.recipes.recipe import Recipe, override_stages
from trainer.train_config import TrainConfig


class StandIn(ModuleType):
    """What of `wandb` is used: `init`, and a run's `log` and `finish`."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **settings: Any) -> "StandIn":
        self.started.append(settings)
        return self

    def log(self, values: dict[str, float], *, step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def test_it_is_told_what_tensorboard_is_and_a_resumed_run_is_the_same_one(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    recipe = replace(override_stages(tiny_recipe, steps=4), checkpoint_every=2)
    config = TrainConfig(cache=tiny_cache.path, recipe=recipe, out=tmp_path / "run", wandb="radio")
    train(config)
    assert [step for step, _ in wandb.logged] == [2, 4]
    values = wandb.logged[-1][1]
    assert {"loss", "lr", "fake-a/spatial", "fake-a/summary", "fake-b/spatial", "wait/pixels"} <= values.keys()
    assert values["loss"] > 0
    assert wandb.finished == 1
    (tmp_path / "run/checkpoints/step-00000004.pt").unlink()
    train(config)
    first, again = wandb.started
    assert first["id"] == again["id"]
    assert first["resume"] == "allow"
    assert (first["project"], first["name"], first["dir"]) == ("radio", "run", str(tmp_path / "run"))
    assert first["config"]["student"] == "e-radio-tiny"


def test_nobody_is_told_unless_asked(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train(TrainConfig(cache=tiny_cache.path, recipe=override_stages(tiny_recipe, steps=2), out=tmp_path / "run"))
    assert wandb.started == []


def test_without_the_package_nothing_is_begun(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"not installed: pip install wandb, or leave --wandb out"):
        train(TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=tmp_path / "run", wandb="radio"))
    assert not (tmp_path / "run").exists()
