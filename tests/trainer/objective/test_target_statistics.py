"""A run keeps what it normalises its targets by, and all its processes have the same."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from radio_cache import Cache
from radio_cache.errors import ConfigError
from radio_cache.testing import make_tiny_cache, write_images
from trainer.distributed.processes import Processes
from trainer.loop import train
from trainer.objective import target_statistics
from trainer.objective.target_statistics import STATISTICS_FILE, RunStatistics, TargetStatistics
from trainer.recipes.recipe import Recipe
from trainer.train_config import TrainConfig

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    write_images(tmp_path / "images")
    return make_tiny_cache(tmp_path / "c.zarr", tmp_path / "images", teachers={"t": (8, 8), "maps": (None, 8)})


@pytest.fixture
def rotated(tiny_recipe: Recipe) -> Recipe:
    return replace(tiny_recipe, normalise="phi-s", normalise_summary="hadamard", summary_loss="angle")


def of_run(out: Path, cache: Cache, recipe: Recipe, processes: Processes | None = None) -> RunStatistics:
    rows = cache.usable_rows()
    return RunStatistics.of_run(out, cache, ["t", "maps"], recipe, rows, CPU, processes or Processes())


def tensors(statistics: RunStatistics) -> dict[str, torch.Tensor]:
    return {key: tensor for name, one in statistics.by_teacher.items() for key, tensor in one.tensors(name).items()}


@pytest.mark.parametrize("how", ["none", "standardise", "global", "phi-s"])
def test_statistics_come_back_from_the_folder_bit_by_bit(
    cache: Cache, rotated: Recipe, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(rotated, normalise=how, normalise_summary=how)
    fitted = of_run(tmp_path, cache, recipe)
    assert not fitted.from_folder
    fitted.save(tmp_path)
    monkeypatch.setattr(TargetStatistics, "fit", None)  # is not called again
    kept = of_run(tmp_path, cache, recipe)
    assert kept.from_folder
    assert tensors(kept).keys() == tensors(fitted).keys()
    for name, tensor in tensors(fitted).items():
        assert torch.equal(tensors(kept)[name], tensor), name
    assert kept.by_teacher["t"].dispersion == fitted.by_teacher["t"].dispersion


def test_a_run_goes_on_with_what_it_began_with(
    cache: Cache, rotated: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(cache=cache.path, recipe=rotated, out=tmp_path / "run")
    train(config)
    before = (tmp_path / "run" / STATISTICS_FILE).read_bytes()
    (tmp_path / "run/student.safetensors").unlink()

    def other(*_: object) -> TargetStatistics:
        raise AssertionError("fitted anew")

    monkeypatch.setattr(TargetStatistics, "fit", other)
    said: list[str] = []
    train(config, said.append)
    assert (tmp_path / "run" / STATISTICS_FILE).read_bytes() == before
    assert not any("computed again" in line for line in said)


def test_a_run_of_before_is_told_that_its_targets_are_fitted_anew(
    cache: Cache, rotated: Recipe, tmp_path: Path
) -> None:
    config = TrainConfig(cache=cache.path, recipe=rotated, out=tmp_path / "run")
    train(config)
    (tmp_path / "run/student.safetensors").unlink()
    (tmp_path / "run" / STATISTICS_FILE).unlink()
    said: list[str] = []
    train(config, said.append)
    assert any("computed again" in line for line in said)
    assert (tmp_path / "run" / STATISTICS_FILE).exists()


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_damaged_statistics_are_named(cache: Cache, rotated: Recipe, tmp_path: Path, damage: str) -> None:
    of_run(tmp_path, cache, rotated).save(tmp_path)
    path = tmp_path / STATISTICS_FILE
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes({"flipped": bytes(data), "cut": bytes(data[:-9]), "empty": b""}[damage])
    with pytest.raises(ConfigError, match=rf"{STATISTICS_FILE} is damaged .* or remove it"):
        of_run(tmp_path, cache, rotated)


def test_the_other_processes_get_those_of_the_first(
    cache: Cache, rotated: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = of_run(tmp_path, cache, rotated)
    sent = iter(sorted(tensors(fitted)))

    class Second(Processes):  # type: ignore[misc]
        """Receives what the first would send."""

        def sum(self, values: torch.Tensor) -> torch.Tensor:
            assert not values.any()
            return values + tensors(fitted)[next(sent)]

    monkeypatch.setattr(target_statistics.TargetStatistics, "fit", None)
    received = of_run(tmp_path / "none", cache, rotated, Second(rank=1, world=2))
    for name, tensor in tensors(fitted).items():
        np.testing.assert_array_equal(tensors(received)[name].numpy(), tensor.numpy())
