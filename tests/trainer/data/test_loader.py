import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from radio_cache.errors import CorruptShardError
from radio_cache.reader import Cache, CachedTeacher
from trainer.data.crops import CropData
from trainer.data.loader import BatchLoader
from trainer.data.schedule import Schedule
from trainer.recipes.recipe import Recipe

CPU = torch.device("cpu")


@pytest.fixture
def data(tiny_cache: Cache, tiny_recipe: Recipe, make_data: Any) -> CropData:
    return make_data(tiny_cache, ("fake-a",), tiny_recipe, (2, 2))


def slow_codes(teacher: CachedTeacher, rows: np.ndarray, out: np.ndarray, view: int) -> None:
    time.sleep(0.05)
    teacher.codes(rows, out=out, view=view)


def test_waiting_is_told_by_what_came_last(data: CropData, tiny_recipe: Recipe) -> None:
    with BatchLoader(Schedule(tiny_recipe), {(0, 0): data}, 0, 4, device=CPU, threads=1, read=slow_codes) as loader:
        waits = [loaded.waits for loaded in loader]
    assert sum(wait.codes for wait in waits) > 0.1 > 10 * sum(wait.pixels for wait in waits)


def test_accumulation_cuts_a_batch_and_keeps_its_images(data: CropData, tiny_recipe: Recipe) -> None:
    schedule = Schedule(dataclasses.replace(tiny_recipe), accumulate=3)
    with BatchLoader(schedule, {(0, 0): data}, 2, 3, device=CPU, threads=2) as loader:
        pieces = [(loaded.batch_slice, loaded.batch.map(torch.clone)) for loaded in loader]
    whole = data.batch(2, 0, 3)
    assert [len(batch.rows) for _, batch in pieces] == [1, 1, 1]
    torch.testing.assert_close(torch.cat([batch.pixels for _, batch in pieces]), whole.pixels)
    codes = torch.cat([batch.teachers[0].levels[0].codes for _, batch in pieces])
    torch.testing.assert_close(codes, whole.teachers[0].levels[0].codes)


def test_damage_stops_training_where_it_is_met(data: CropData, tiny_cache: Cache, tiny_recipe: Recipe) -> None:
    for shard in Path(tiny_cache.path, "teachers/fake-a/spatial").rglob("c/0/*/0/0/0"):
        content = bytearray(shard.read_bytes())
        content[5] ^= 255
        shard.write_bytes(content)
    with (
        pytest.raises(CorruptShardError, match="fake-a"),
        BatchLoader(Schedule(tiny_recipe), {(0, 0): data}, 0, 4, device=CPU, threads=2) as loader,
    ):
        list(loader)
