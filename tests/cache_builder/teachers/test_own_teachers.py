"""Teachers that are the user's own: a module by its import path, and what lies in a folder or repository of timm or open_clip."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from cache_builder.cli import main
from cache_builder.teachers import TeacherOptions, cache_group, find_teacher, load_recorded, load_teacher
from radio_cache.allowed_modules import allowing_modules
from radio_cache.errors import ConfigError, TeacherWeightsError, UnknownTeacherError
from radio_cache.reader import Cache

CODE = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 6, 16, 16)

    def forward(self, images):
        return self.patches(images)

class Wrong(Net):
    def forward(self, images):
        return self.patches(images).mean()

NOT_A_CLASS = 3
"""
NAME = "torch-module:my_own_teacher:Net"


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Weights of the module, which lies on the path of imports."""
    (tmp_path / "my_own_teacher.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    save_file(torch.nn.ModuleDict({"patches": torch.nn.Conv2d(3, 6, 16, 16)}).state_dict(), tmp_path / "w.safetensors")
    yield tmp_path / "w.safetensors"
    sys.modules.pop("my_own_teacher", None)


def test_ones_own_module_is_a_teacher_with_its_own_weights(weights: Path) -> None:
    teacher = load_teacher(NAME, TeacherOptions(weights=weights, size_px=64))
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        out = teacher(images)
        maps = teacher._net(images)
    assert torch.equal(out.spatial, maps.permute(0, 2, 3, 1))
    assert out.summary is not None
    assert torch.equal(out.summary, maps.mean((2, 3)))
    geometry = teacher.spec.geometry
    assert (geometry.grid_hw, geometry.stride_px, geometry.offset_px) == ((4, 4), 16, 8)
    assert (teacher.spec.name, teacher.spec.model) == ("torch-module-my_own_teacher-net", NAME)
    assert len(teacher.spec.loaded["code"]) == 16


def test_a_cache_may_not_name_a_module_unless_the_caller_allows_it(weights: Path) -> None:
    spec = load_teacher(NAME, TeacherOptions(weights=weights, size_px=64)).spec
    sys.modules.pop("my_own_teacher")
    with pytest.raises(ConfigError, match=r"--allow-module my_own_teacher"):
        load_recorded(spec)
    assert "my_own_teacher" not in sys.modules
    with allowing_modules(["my_own_teacher"]):
        assert load_recorded(spec).spec == spec


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch-module:my_own_teacher:NOT_A_CLASS", "is a int, not a class of nn.Module"),
        ("torch-module:json:JSONDecoder", "does not derive from nn.Module"),
        ("torch-module:no_such_module_at_all:Net", "cannot be imported"),
        ("torch-module:my_own_teacher", "takes an import path"),
        ("torch-module:my_own_teacher:Wrong", r"it returns \(\); expected is a map"),
    ],
)
def test_what_is_no_such_module_is_refused(name: str, message: str, weights: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_teacher(name, TeacherOptions(weights=weights, size_px=64))


def test_a_module_needs_weights_and_all_of_them(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(TeacherWeightsError, match="pass yours with --weights FILE"):
        load_teacher(NAME)
    torch.save({"patches.weight": torch.zeros(6, 3, 16, 16)}, tmp_path / "part.pth")
    with pytest.raises(TeacherWeightsError, match=r"1 tensors missing \(such as patches\.bias\)"):
        load_teacher(NAME, TeacherOptions(weights=tmp_path / "part.pth", size_px=64))


def test_other_code_is_another_teacher(weights: Path, tmp_path: Path) -> None:
    options = TeacherOptions(weights=weights, size_px=64)
    spec = load_teacher(NAME, options).spec
    sys.modules.pop("my_own_teacher")
    (tmp_path / "my_own_teacher.py").write_text(CODE.replace("self.patches(images)\n", "-self.patches(images)\n"))
    other = load_teacher(NAME, options).spec
    assert any("loaded.code" in difference for difference in spec.differences(other))


def test_a_cache_is_built_and_recomputed_with_ones_own_module(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    for number in range(3):
        Image.new("RGB", (90, 70), (60 * number, 20, 90)).save(tmp_path / "pics" / f"{number}.png")
    cache = str(tmp_path / "x.zarr")
    done = CliRunner().invoke(
        main,
        [
            "build",
            "--images",
            str(tmp_path / "pics"),
            "--teacher",
            NAME,
            "--weights",
            str(weights),
            "--size",
            "64",
            "--codec",
            "half",
            "--out",
            cache,
        ],
    )
    assert done.exit_code == 0, done.output
    assert list(Cache(cache).teachers) == ["torch-module-my_own_teacher-net"]
    refused = CliRunner().invoke(main, ["verify", cache, "--recompute", "2"])
    assert refused.exit_code != 0
    assert "--allow-module my_own_teacher" in refused.output
    done = CliRunner().invoke(main, ["verify", cache, "--recompute", "2", "--allow-module", "my_own_teacher"])
    assert done.exit_code == 0, done.output
    assert "sees 75% of a 4:3 photo); code: " in " ".join(CliRunner().invoke(main, ["info", cache]).output.split())


# ---------------------------------------------------------------- folders and repositories


def timm_folder(folder: Path) -> Any:
    """A folder as timm's `save_for_hf` writes it, of a model that was trained at its own size and with its own pixels."""
    net = timm.create_model("test_vit", num_classes=3, img_size=96).eval()
    config = {
        "architecture": "test_vit",
        "num_classes": 3,
        "model_args": {"img_size": 96},
        "pretrained_cfg": {
            "input_size": [3, 96, 96],
            "mean": [0.1, 0.2, 0.3],
            "std": [1, 1, 1],
            "crop_pct": 0.75,
            "interpolation": "bilinear",
            "crop_mode": "center",
            "fixed_input_size": True,
        },
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(net.state_dict(), folder / "model.safetensors")
    return net


def test_a_folder_of_timm_is_a_teacher(tmp_path: Path) -> None:
    net = timm_folder(tmp_path / "mine")
    name = f"timm:local-dir:{tmp_path / 'mine'}"
    assert find_teacher(name).photo_share == pytest.approx(0.75**3)
    teacher = load_teacher(name)
    assert teacher.spec.name == cache_group(name, TeacherOptions()) == "timm-local-dir-mine"
    assert teacher.spec.normalisation.mean == (0.1, 0.2, 0.3)
    assert (teacher.spec.geometry.input_hw, teacher.spec.geometry.resize_px) == ((96, 96), 128)
    images = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        pooled = net.forward_head(net.forward_features(images), pre_logits=True)
        torch.testing.assert_close(teacher(images).summary, pooled, atol=1e-5, rtol=1e-5)
    assert load_recorded(teacher.spec).spec == teacher.spec


def test_a_repository_of_timm_is_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm_folder(tmp_path / "mine")
    asked: list[tuple[str, str]] = []

    def cached(repository: str, file: str, **_: Any) -> str | None:
        asked.append((repository, file))
        path = tmp_path / "mine" / file
        return str(path) if path.is_file() else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda repository, file, **_: cached(repository, file))
    teacher = load_teacher("timm:hf-hub:me/mine")
    assert (teacher.spec.name, teacher.spec.model) == ("timm-hf-hub-me.mine", "timm:hf-hub:me/mine")
    assert teacher.spec.weights == "huggingface.co/me/mine, file model.safetensors"
    assert ("me/mine", "model.safetensors") in asked


def test_a_folder_of_open_clip_is_a_teacher(tmp_path: Path) -> None:
    config = {
        "model_cfg": {
            "embed_dim": 16,
            "quick_gelu": True,
            "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16},
            "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"},
    }
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "open_clip_config.json").write_text(json.dumps(config))
    net = open_clip.CLIP(**config["model_cfg"]).eval()
    torch.save(net.state_dict(), tmp_path / "mine" / "open_clip_pytorch_model.bin")
    teacher = load_teacher(f"open_clip:local-dir:{tmp_path / 'mine'}")
    assert teacher.spec.name == "open_clip-local-dir-mine"
    assert (teacher.spec.geometry.fit, teacher.spec.normalisation.mean) == ("squash", (0.5, 0.5, 0.5))
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(teacher(images).summary, net.encode_image(images), atol=1e-5, rtol=1e-5)
    assert load_recorded(teacher.spec).spec == teacher.spec
    assert teacher.notes == ()


@pytest.mark.parametrize("library", ["timm", "open_clip"])
@pytest.mark.parametrize("content", [None, "{", "[]", '{"architecture": "no_such_model"}'])
def test_a_folder_without_a_model_is_refused(library: str, content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
        (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(UnknownTeacherError, match=rf"{library}:local-dir:{tmp_path}"):
        find_teacher(f"{library}:local-dir:{tmp_path}")


def test_a_folder_without_weights_says_which_files_it_lacks(tmp_path: Path) -> None:
    timm_folder(tmp_path / "mine")
    (tmp_path / "mine" / "model.safetensors").unlink()
    with pytest.raises(TeacherWeightsError, match=r"mine holds none of model.safetensors, pytorch_model.bin"):
        load_teacher(f"timm:local-dir:{tmp_path / 'mine'}")


def test_weights_that_were_given_stay_those_at_another_size(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "w.pth")
    spec = load_teacher("timm:test_vit", TeacherOptions(weights=tmp_path / "w.pth")).spec
    larger = load_recorded(replace(spec), size_px=224).spec
    assert (larger.weights_sha256, larger.geometry.input_hw) == (spec.weights_sha256, (224, 224))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_args": {"foo": 1}}, "cannot be built with"),
        ({"model_args": {"pretrained": True}}, "cannot be built with"),
        ({"model_args": {"block_fn": "os:system"}}, "cannot be built with"),
        ({"model_args": {"checkpoint_path": "/elsewhere"}}, "cannot be built with"),
        ({"pretrained_cfg": {"input_size": [3, 0, 0]}}, "a height and a width"),
        ({"pretrained_cfg": {"input_size": [160]}}, "a height and a width"),
        ({"pretrained_cfg": {"mean": [0.5] * 4}}, "three numbers"),
        ({"pretrained_cfg": {"mean": "half"}}, "three numbers"),
        ({"pretrained_cfg": {"std": [0, 0, 0]}}, "above 0"),
    ],
)
def test_a_configuration_that_describes_no_network_is_refused_in_a_sentence(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    timm_folder(tmp_path / "mine")
    file = tmp_path / "mine" / "config.json"
    config = json.loads(file.read_text())
    config |= {key: config.get(key, {}) | value for key, value in change.items()}
    if "pretrained_cfg" in change:
        del config["model_args"]  # whose size counts
    file.write_text(json.dumps(config))
    with pytest.raises((ConfigError, TeacherWeightsError), match=message):
        load_teacher(f"timm:local-dir:{tmp_path / 'mine'}", TeacherOptions())


@pytest.mark.parametrize("name", ["local-dir:{other}", "hf-hub:somebody/model", "nonesuch", 3])
def test_an_open_clip_folder_leads_timm_to_no_other_place(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, mine = tmp_path / "other", tmp_path / "mine"
    timm_folder(other)
    mine.mkdir()
    name = name.format(other=other) if isinstance(name, str) else name
    vision = {"timm_model_name": name, "image_size": 160, "timm_pool": "avg"}
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": {}}, "preprocess_cfg": {}}
    (mine / "open_clip_config.json").write_text(json.dumps(config))
    opened: list[Any] = []
    monkeypatch.setattr(timm, "create_model", lambda *words, **_: opened.append(words))
    with pytest.raises(ConfigError, match="which timm does not know"):
        load_teacher(f"open_clip:local-dir:{mine}", TeacherOptions())
    assert opened == []
