"""DINOv2: small random ViTs of timm's own class, under timm's names and under Meta's, give timm's features."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

from cache_builder.teachers import TeacherOptions, TeacherPreset, load_teacher
from cache_builder.teachers.base import Teacher
from cache_builder.teachers.presets import DINOV2S
from radio_cache.errors import ConfigError, TeacherWeightsError

See = Callable[[Teacher, Image.Image], torch.Tensor]

ARCHITECTURES = {
    "dinov2-vit-s-14": "vit_small_patch14_dinov2",
    "dinov2-vit-s-14-reg": "vit_small_patch14_reg4_dinov2",
    "dinov2-vit-g-14": "vit_giant_patch14_dinov2",
}
"""Preset -> timm's model: with and without registers, with a plain and with a gated MLP."""


def small_vit(name: str, *, img_size: int = 56, seed: int = 0, width: int = 128) -> Any:
    """Two layers, heads of 64 as in every DINOv2; every tensor random, so that none could be forgotten unnoticed."""
    torch.manual_seed(seed)
    net = timm.create_model(
        ARCHITECTURES[name],
        pretrained=False,
        num_classes=0,
        img_size=img_size,
        embed_dim=width,
        depth=2,
        num_heads=width // 64,
    ).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def metas_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights as facebookresearch/dinov2 writes them.

    Registers have another name, gated MLPs too; a mask token comes along; and the class token always has a position.
    """
    renames = {"reg_token": "register_tokens"}
    gated = state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]
    meta: dict[str, torch.Tensor] = {"mask_token": torch.zeros(1, state["cls_token"].shape[-1])}
    for key, value in state.items():
        if gated:
            key = key.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3.")
        meta[renames.get(key, key)] = value
    if "register_tokens" in meta:
        position = torch.randn_like(state["cls_token"])
        meta["cls_token"] = state["cls_token"] - position
        meta["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    return meta


def assert_same(teacher: Teacher, net: Any, size_px: int) -> None:
    images = torch.randn(2, 3, size_px, size_px)
    with torch.inference_mode():
        tokens, out = net.forward_features(images), teacher(images)
    assert out.summary is not None
    assert out.summary.shape == (2, teacher.spec.summary_dim)
    assert out.spatial.shape == (2, *teacher.spec.geometry.grid_hw, teacher.spec.spatial_dim)
    torch.testing.assert_close(out.summary, tokens[:, 0], atol=1e-5, rtol=1e-5)
    expected = tokens[:, 5 if net.num_reg_tokens else 1 :]
    torch.testing.assert_close(out.spatial.flatten(1, 2), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("names", ["timm", "meta"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_features_are_those_of_timms_own_forward(tmp_path: Path, name: str, names: str) -> None:
    net = small_vit(name)
    state = net.state_dict() if names == "timm" else metas_names(net.state_dict())
    torch.save(state, tmp_path / "dino.pth")
    teacher = load_teacher(name, TeacherOptions(weights=tmp_path / "dino.pth", size_px=56))
    assert_same(teacher, net, 56)
    assert "not the published" in teacher.notes[0]


def test_safetensors_load_as_well(tmp_path: Path) -> None:
    net = small_vit("dinov2-vit-s-14-reg")
    save_file(net.state_dict(), tmp_path / "dino.safetensors")
    options = TeacherOptions(weights=tmp_path / "dino.safetensors", size_px=56)
    assert_same(load_teacher("dinov2-vit-s-14-reg", options), net, 56)


@pytest.mark.parametrize("names", ["timm", "meta"])
@pytest.mark.parametrize("name", ["dinov2-vit-s-14", "dinov2-vit-s-14-reg"])
def test_another_size_resamples_positions_as_timm_does(tmp_path: Path, name: str, names: str) -> None:
    net = small_vit(name, img_size=56)
    torch.save(net.state_dict() if names == "timm" else metas_names(net.state_dict()), tmp_path / "dino.pth")
    net.set_input_size((84, 84))
    teacher = load_teacher(name, TeacherOptions(weights=tmp_path / "dino.pth", size_px=84))
    assert_same(teacher, net, 84)


def test_a_hidden_width_that_is_no_round_multiple_loads(tmp_path: Path) -> None:
    """The giant's gated MLP is 2 * 2.66667 times as wide as the network, rounded somewhere."""
    net = small_vit("dinov2-vit-g-14", width=320)
    torch.save(net.state_dict(), tmp_path / "dino.pth")
    assert_same(load_teacher("dinov2-vit-g-14", TeacherOptions(weights=tmp_path / "dino.pth", size_px=56)), net, 56)


def test_a_gated_file_under_an_ungated_name_is_built_from_the_file_and_told(tmp_path: Path) -> None:
    net = small_vit("dinov2-vit-g-14")
    torch.save(net.state_dict(), tmp_path / "dino.pth")
    teacher = load_teacher("dinov2-vit-s-14", TeacherOptions(weights=tmp_path / "dino.pth", size_px=56))
    assert_same(teacher, net, 56)
    assert "these weights are not the published vit_small_patch14_dinov2: width 128, 2 layers" in teacher.notes[0]


def test_a_size_that_is_no_multiple_of_the_patch_is_refused(tmp_path: Path) -> None:
    torch.save(small_vit("dinov2-vit-s-14").state_dict(), tmp_path / "dino.pth")
    with pytest.raises(ConfigError, match="input size 60 px is not a multiple of the patch, 14 px; nearest: 56"):
        load_teacher("dinov2-vit-s-14", TeacherOptions(weights=tmp_path / "dino.pth", size_px=60))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    state = small_vit("dinov2-vit-s-14").state_dict()
    del state["blocks.1.ls1.gamma"]
    torch.save(state, tmp_path / "dino.pth")
    with pytest.raises(TeacherWeightsError, match=r"1 tensors missing \(such as blocks\.1\.ls1\.gamma\)"):
        load_teacher("dinov2-vit-s-14", TeacherOptions(weights=tmp_path / "dino.pth", size_px=56))


@pytest.mark.parametrize("preset", [DINOV2S[0], *DINOV2S[1::2]], ids=lambda preset: preset.name)
def test_a_preset_is_a_model_of_timm_with_its_parameters(preset: TeacherPreset) -> None:
    with torch.device("meta"):
        net = timm.create_model(preset.model, pretrained=False, num_classes=0)
    millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    assert preset.params == f"{millions:.0f} M"
    assert net.num_reg_tokens == (4 if preset.name.endswith("-reg") else 0)


@functools.cache
def teacher_at_its_own_size(folder: Path) -> Teacher:
    torch.save(small_vit("dinov2-vit-s-14", img_size=224).state_dict(), folder / "dino-224.pth")
    return load_teacher("dinov2-vit-s-14", TeacherOptions(weights=folder / "dino-224.pth"))


@functools.cache
def timms_transform() -> Callable[[Image.Image], torch.Tensor]:
    with torch.device("meta"):
        net = timm.create_model("vit_small_patch14_dinov2", pretrained=False)
    return create_transform(**resolve_data_config({"input_size": (3, 224, 224)}, model=net))


def test_pixels_are_those_of_timms_transform_at_the_presets_size(
    tmp_path_factory: pytest.TempPathFactory, seen_by: See, photo: Image.Image
) -> None:
    teacher = teacher_at_its_own_size(tmp_path_factory.getbasetemp())
    torch.testing.assert_close(seen_by(teacher, photo)[0], timms_transform()(photo), atol=1e-6, rtol=0)
