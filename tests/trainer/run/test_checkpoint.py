import errno
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from radio_cache.errors import NonFiniteLossError, TrainingError
from radio_cache.reader import Cache
from trainer.loop import train
from trainer.recipes.recipe import Recipe
from trainer.run.checkpoint import (
    Progress,
    TrainingState,
    checkpoints,
    report_last_checkpoint,
    restore_last,
    save_checkpoint,
)
from trainer.run.step import TrainingRun
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


IN_THE_WAY: dict[str, tuple[Exception, str]] = {
    "permission": (PermissionError(errno.EACCES, "Permission denied"), "cannot be read at present .Permission denied"),
    "a disk": (OSError(errno.EIO, "Input/output error"), "cannot be read at present .Input/output error"),
    "a network disk": (OSError(errno.ESTALE, "Stale file handle"), "cannot be read at present .Stale file handle"),
    "open files": (OSError(errno.EMFILE, "Too many open files"), "cannot be read at present .Too many open files"),
    "memory": (MemoryError(), r"\(\d+\.\d\d GB\) does not fit into memory"),
    "memory of the system": (OSError(errno.ENOMEM, "Cannot allocate memory"), "does not fit into memory"),
    "memory of torch": (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        "does not fit into memory",
    ),
    "another version": (RuntimeError("Attempted to read a PyTorch file with version 99"), "is whole, and this PyTorch"),
}


def two_checkpoints(folder: Path) -> TrainingState:
    """A trainee whose states after two and after four steps are saved."""
    student, adaptors = nn.Linear(2, 3), nn.Linear(3, 1)
    optimizer = torch.optim.AdamW([*student.parameters(), *adaptors.parameters()])
    adaptors(student(torch.ones(1, 2))).sum().backward()
    training_state = TrainingState(student, adaptors, nn.Identity(), optimizer)
    for step in (2, 4):
        optimizer.step()
        save_checkpoint(folder, training_state.state_dict(), Progress(step), keep=2)
    return training_state


@pytest.mark.parametrize("cause", IN_THE_WAY)
@pytest.mark.parametrize("where", ["opening", "loading", "taking up"])
def test_a_checkpoint_that_cannot_be_used_just_now_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: str, where: str
) -> None:
    error, message = IN_THE_WAY[cause]
    training_state = two_checkpoints(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 2

    def refuse(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        match where:
            case "opening" if not isinstance(error, RuntimeError):
                patch.setattr(zipfile, "ZipFile", refuse)
            case "taking up" if cause in ("memory", "memory of torch"):
                patch.setattr(torch.optim.AdamW, "load_state_dict", refuse)
            case _:
                patch.setattr(torch, "load", refuse)
        with pytest.raises(TrainingError, match=rf"step-00000004\.pt .*{message}") as caught:
            restore_last(tmp_path, training_state, print)
    assert "damaged" not in str(caught.value)
    assert "remove" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert restore_last(tmp_path, training_state, print).step == 4


@pytest.mark.parametrize("damage", ["cut", "flipped", "a bit", "empty"])
def test_damage_is_what_the_bytes_show(tmp_path: Path, damage: str) -> None:
    training_state = two_checkpoints(tmp_path)
    file = tmp_path / "step-00000004.pt"
    content = bytearray(file.read_bytes())
    match damage:
        case "cut":
            content = content[: len(content) // 2]
        case "flipped":
            content[:100] = bytes(100)
        case "a bit":  # in a weight: torch loads it without a word
            place = bytes(content).index(training_state.student.weight.detach().numpy().tobytes())
            content[place] ^= 1
        case _:
            content.clear()
    file.write_bytes(content)
    said: list[str] = []
    assert restore_last(tmp_path, training_state, said.append).step == 2
    assert "step-00000004.pt is damaged" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002.pt", "step-00000004.pt.damaged"]


def test_another_number_of_threads_is_said(tmp_path: Path) -> None:
    training_state, said, before = two_checkpoints(tmp_path), list[str](), torch.get_num_threads()
    restore_last(tmp_path, training_state, said.append)
    assert said == []
    torch.set_num_threads(before + 1)
    try:
        restore_last(tmp_path, training_state, said.append)
    finally:
        torch.set_num_threads(before)
    assert f"by {before} threads so far and is by {before + 1} now" in said[0]
    assert f"OMP_NUM_THREADS={before} goes on as before" in said[0]


def test_checkpoints_of_a_folder_that_cannot_be_listed_are_not_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would train anew, over what is there."""
    training_state, listed = two_checkpoints(tmp_path), os.scandir

    def refuse(place: Any = ".") -> Any:
        if Path(place) == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return listed(place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(TrainingError, match=r"cannot be listed \(Permission denied\)"):
        restore_last(tmp_path, training_state, print)


def test_nothing_is_trained_anew_where_every_checkpoint_is_damaged(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    config = TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=tmp_path / "run")
    train(config)
    for path in checkpoints(tmp_path / "run/checkpoints"):
        path.write_bytes(b"nothing")
    with pytest.raises(TrainingError, match=r"none of the checkpoints in .* can be read"):
        train(config)
    assert len(checkpoints(tmp_path / "run/checkpoints")) == 2


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
    with refused, report_last_checkpoint(tmp_path):
        (tmp_path / "nowhere").open()
    with pytest.raises(BrokenPipeError), report_last_checkpoint(tmp_path):
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


def test_a_disk_that_is_full_when_the_student_is_written_is_named_and_nothing_half_is_left(
    tiny_cache: Cache, tiny_recipe: Recipe, small_disk: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, finish = small_disk(200_000_000), TrainingRun.finish

    def fill_up(run: TrainingRun) -> None:
        used = sum(file.stat().st_size for file in disk.path.rglob("*") if file.is_file())
        disk.resize(used + 2_000_000)
        finish(run)

    monkeypatch.setattr(TrainingRun, "finish", fill_up)
    config = TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=disk.path / "run")
    with pytest.raises(TrainingError, match=r"the disk of .* is full .*step-00000008\.pt is whole: make room"):
        train(config)
    assert not list(disk.path.rglob("*.partial"))
    monkeypatch.undo()
    disk.resize(200_000_000)
    assert train(config).steps_before == 8
    assert (disk.path / "run/student.safetensors").exists()
