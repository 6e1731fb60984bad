"""Batches that do not fit into memory are split, and what is stored does not depend on how batches were cut."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_builder.build import BuildReport
from cache_builder.pipeline.device import device_streams
from cache_builder.teachers import TeacherOptions
from radio_cache import Cache
from radio_cache.codecs.calibrate import CodecRequest
from radio_cache.errors import TeacherError
from radio_cache.format.codec_record import CodecRecord

Build = Callable[..., BuildReport]

ONE = {"fake-a": TeacherOptions()}


def files(cache: Cache) -> dict[str, bytes]:
    return {path: cache.storage.read(path) for path, _ in cache.storage.list_files("teachers")}


@pytest.fixture
def room_for(fake_module: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """room_for(n): the fake teacher runs out of memory above n images. Returns the sizes of batches it was called with."""
    original = fake_module.FakeTeacher.__call__

    def limit(most: int, error: Exception | None = None) -> list[int]:
        sizes: list[int] = []

        def call(self: Any, images: torch.Tensor) -> Any:
            sizes.append(len(images))
            if len(images) > most:
                raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
            return original(self, images)

        monkeypatch.setattr(fake_module.FakeTeacher, "__call__", call)
        return sizes

    return limit


@pytest.mark.parametrize("most", [1, 2, 5])
def test_a_batch_that_does_not_fit_is_split_and_nothing_is_lost(
    build: Build, tmp_path: Path, room_for: Callable[..., list[int]], most: int
) -> None:
    whole = build(teachers=ONE, out=tmp_path / "whole.zarr", shard_images=10, batch_size=10).cache
    sizes = room_for(most)
    said: list[str] = []
    tight = build(teachers=ONE, shard_images=10, batch_size=10, on_message=said.append).cache
    # Up to the last bits: the kernels choose by shape how to sum three products.
    np.testing.assert_allclose(
        tight.teachers["fake-a"].maps(range(10)), whole.teachers["fake-a"].maps(range(10)), atol=2e-3
    )
    np.testing.assert_allclose(
        tight.teachers["fake-a"].spatial_mean_std(), whole.teachers["fake-a"].spatial_mean_std(), rtol=1e-5
    )
    assert tight.usable_rows(["fake-a"]).tolist() == list(range(10))
    assert sum(size for size in sizes if size <= most) == 10
    assert any("images at once are too many for the memory of cpu; going on with" in line for line in said)


def test_once_a_batch_did_not_fit_the_next_ones_are_no_larger(build: Build, room_for: Callable[..., list[int]]) -> None:
    sizes = room_for(2)
    with device_streams(torch.device("cpu")):  # one after the other
        build(teachers=ONE, shard_images=5, batch_size=5)
    assert sum(size > 2 for size in sizes) <= 2
    assert sum(size for size in sizes if size <= 2) == 10


def test_main_memory_that_runs_out_is_the_same_case(build: Build, room_for: Callable[..., list[int]]) -> None:
    room_for(
        3, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    )
    assert build(teachers=ONE, batch_size=10, shard_images=10).results[0].images == 10


def test_a_teacher_that_does_not_fit_at_all_says_what_to_do(build: Build, room_for: Callable[..., list[int]]) -> None:
    room_for(0)
    with pytest.raises(
        TeacherError, match=r"teacher 'fake-a': not even one image fits .*CUDA out of memory.*--dtype bfloat16"
    ):
        build(teachers=ONE)


def test_another_error_of_the_teacher_is_not_taken_for_a_lack_of_memory(
    build: Build, room_for: Callable[..., list[int]]
) -> None:
    sizes = room_for(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        build(teachers=ONE, threads=1)
    assert set(sizes) <= {1, 2}


def test_a_real_network_says_the_same_in_batches_of_any_size_on_threads_of_their_own(
    build: Build, tmp_path: Path
) -> None:
    """Float32 on a CPU: what docs/build.md promises, in the calibrated codec and with views."""
    asked = CodecRecord.of_request(CodecRequest(name="int8"))
    teachers = {"efficientnet-lite0": TeacherOptions(size_px=96, codec=asked)}
    found = [
        files(
            build(
                out=tmp_path / f"{size}.zarr", teachers=teachers, shard_images=10, batch_size=size, threads=size
            ).cache
        )
        for size in (1, 4)
    ]
    documents = [one.pop("teachers/efficientnet-lite0/zarr.json") for one in found]  # where the batch size is recorded
    assert documents[0] != documents[1]
    assert found[0] == found[1]


def test_batches_on_a_cpu_run_on_one_thread_each_and_the_setting_comes_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with device_streams(torch.device("cpu")) as streams:
            assert streams == 3
            inside: list[int] = []
            thread = threading.Thread(target=lambda: inside.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert inside == [1]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
