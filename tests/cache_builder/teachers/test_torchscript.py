"""OpenAI's CLIP files: TorchScript archives give the tensors that torch's own loader gives, and nothing in them runs."""

import io
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.openai import load_openai_model

from cache_builder.teachers import TeacherOptions, load_teacher
from cache_builder.teachers.torchscript import is_torchscript, read_torchscript
from cache_builder.teachers.weights import file_sha256
from radio_cache.errors import TeacherWeightsError


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP, random, traced and in half precision as OpenAI's are."""
    vision = CLIPVisionCfg(layers=2, width=64, head_width=64, patch_size=14, image_size=56)
    text = CLIPTextCfg(context_length=8, vocab_size=64, width=64, heads=1, layers=1)
    torch.manual_seed(0)
    model = CLIP(24, vision, text, quick_gelu=True).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    mask = model._buffers.pop("attn_mask")
    object.__setattr__(model, "attn_mask", mask)  # a constant of the trace, as in OpenAI's files
    path = tmp_path_factory.mktemp("openai") / "ViT-small.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = (torch.zeros(1, 3, 56, 56), torch.zeros(1, 8, dtype=torch.long))
        torch.jit.save(torch.jit.trace(model, inputs, check_trace=False).half(), path)
    return path


def test_tensors_are_those_of_torchs_own_loader(archive: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.jit.load(archive).state_dict()
    ours = read_torchscript(archive)
    assert is_torchscript(archive)
    assert theirs.keys() <= ours.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


def test_features_are_those_of_open_clips_own_loader_of_openais_files(archive: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_openai_model(str(archive), device="cpu")
    teacher = load_teacher("openai-clip-vit-l-14-336", TeacherOptions(weights=archive))
    images = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        expected, out = model.encode_image(images), teacher(images)
    assert out.summary is not None
    torch.testing.assert_close(out.summary, expected, atol=1e-5, rtol=1e-5)
    assert teacher.spec.weights_sha256 == file_sha256(archive)


class RunsCommand:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.proof}",)


def rewritten(archive: Path, to: Path, **files: bytes) -> Path:
    """The archive with some of its files replaced."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            leaf = name.partition("/")[2].replace(".", "_").replace("/", "_")
            new.writestr(name, files.get(leaf, old.read(name)))
    return to


def test_an_archive_that_would_run_code_is_refused_and_runs_nothing(archive: Path, tmp_path: Path) -> None:
    proof = tmp_path / "it-ran"
    evil = rewritten(archive, tmp_path / "evil.pt", data_pkl=pickle.dumps(RunsCommand(proof), protocol=2))
    assert is_torchscript(evil)
    with pytest.raises(
        TeacherWeightsError, match=r"evil\.pt is not a plain file of tensors, .*\(it requires (posix|nt)\.system"
    ):
        load_teacher("openai-clip-vit-l-14-336", TeacherOptions(weights=evil))
    assert not proof.exists()
    pickle.load(io.BytesIO(pickle.dumps(RunsCommand(proof))))
    assert proof.exists(), "the archive was harmless, and the test worth nothing"


def test_code_in_the_archive_is_never_looked_at(archive: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(archive) as old:
        code = [name for name in old.namelist() if "/code/" in name]
    assert code
    broken = {name.partition("/")[2].replace(".", "_").replace("/", "_"): b"this is no code" for name in code}
    same = read_torchscript(rewritten(archive, tmp_path / "no-code.pt", **broken))
    assert same.keys() == read_torchscript(archive).keys()


@pytest.mark.parametrize("damage", ["cut", "short storage", "bits"])
def test_a_damaged_archive_is_named(archive: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "w.pt"
    whole = archive.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "bits":
        middle = len(whole) // 2
        path.write_bytes(
            whole[:middle] + bytes(byte ^ 255 for byte in whole[middle : middle + 64]) + whole[middle + 64 :]
        )
    else:
        rewritten(archive, path, data_0=b"\0\0")
    with pytest.raises(TeacherWeightsError, match=r"teacher 'openai-clip-vit-l-14-336': .*w\.pt "):
        load_teacher("openai-clip-vit-l-14-336", TeacherOptions(weights=path))
