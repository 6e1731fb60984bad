"""`--batch-size auto`: a batch that suits the teacher and the device."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cache_builder.build import BuildReport
from cache_builder.build_config import BuildConfig
from cache_builder.commands.build_options import parse_batch_size
from cache_builder.pipeline.batch_size import (
    CPU_BATCH,
    fastest_batch,
    images_per_s,
    resolve_batch_size,
    resolve_shared_batch_size,
)
from cache_builder.teachers import TeacherOptions, load_teacher
from radio_cache.errors import ConfigError

CPU = torch.device("cpu")


def test_it_grows_until_it_is_no_faster() -> None:
    rates = {1: 10.0, 2: 19.0, 4: 30.0, 8: 31.0, 16: 90.0}
    assert fastest_batch(rates.__getitem__, 16) == 4


def test_it_grows_until_it_does_not_fit() -> None:
    assert fastest_batch(lambda images: 10.0 * images if images <= 16 else None, 1024) == 16


def test_it_fills_a_shard_at_most() -> None:
    tried: list[int] = []

    def rate(images: int) -> float:
        tried.append(images)
        return float(images)

    assert fastest_batch(rate, 12) == 12
    assert tried == [1, 2, 4, 8, 12]


def test_a_teacher_with_a_cost_of_every_call_is_faster_in_large_batches(
    fake_module: Any, fake_teachers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_teacher("fake-a")
    original = fake_module.FakeTeacher.__call__

    def call(self: Any, images: torch.Tensor) -> Any:
        if len(images) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        time.sleep(0.02)
        return original(self, images)

    monkeypatch.setattr(fake_module.FakeTeacher, "__call__", call)
    assert images_per_s(teacher, CPU, 16) is None
    small, large = images_per_s(teacher, CPU, 1), images_per_s(teacher, CPU, 8)
    assert small is not None
    assert large is not None
    assert large > 2 * small
    assert fastest_batch(lambda images: images_per_s(teacher, CPU, images), 64) == 8


def test_on_a_cpu_it_is_a_fixed_number_and_workers_take_the_same(
    fake_teachers: tuple[str, ...], tmp_path: Path
) -> None:
    config = BuildConfig(
        images=("x",), teachers={"fake-a": TeacherOptions()}, out=tmp_path / "o", batch_size="auto", device="cpu"
    )
    assert resolve_batch_size(config, load_teacher("fake-a"), print).batch_images == CPU_BATCH
    assert resolve_shared_batch_size(config).batch_images == CPU_BATCH


def test_workers_on_gpus_must_be_told_a_number(tmp_path: Path) -> None:
    config = BuildConfig(
        images=("x",), teachers={"fake-a": TeacherOptions()}, out=tmp_path / "o", batch_size="auto", device="cuda"
    )
    with pytest.raises(ConfigError, match=r"--batch-size auto is for one process.*give that number"):
        resolve_shared_batch_size(config)


def test_a_build_with_it_is_complete(build: Callable[..., BuildReport]) -> None:
    assert [result.images for result in build(batch_size="auto").results] == [10, 10]


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5", ""])
def test_a_size_that_is_neither_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--batch-size {text}: a whole number of images, or auto"):
        parse_batch_size(text)


def test_a_size_is_a_number_or_auto() -> None:
    assert parse_batch_size("auto") == "auto"
    assert parse_batch_size("7") == 7
