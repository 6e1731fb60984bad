"""DINOv2: small random ViTs of timm's own class, under timm's names and under Meta's, give timm's features."""

import argparse
import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

from cache_builder.build import BuildConfig, build_cache
from cache_builder.checks.recompute import RecomputeConfig, recompute
from cache_builder.teachers import TeacherOptions, TeacherPreset, load_recorded, load_teacher
from cache_builder.teachers.base import Teacher
from cache_builder.teachers.presets import DINOV2S
from radio_cache.errors import ConfigError, TeacherWeightsError
from radio_cache.format.codec_record import CodecRecord
from radio_cache.reader import Cache

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


def metas_positions(table: torch.Tensor, tokens: int) -> torch.Tensor:
    """Meta's positions for another number of tokens, written out: bicubic (a = -0.75), scaled by (tokens + 0.1) / side."""
    side = round((table.shape[1] - 1) ** 0.5)
    grid = table[0, 1:].double().unflatten(0, (side, side))
    scale = side / (tokens + 0.1)
    weights = torch.zeros(tokens, side, dtype=torch.float64)
    for token in range(tokens):
        centre = (token + 0.5) * scale - 0.5
        first = math.floor(centre) - 1
        for place in range(first, first + 4):
            far = abs(centre - place)
            near = 1.25 * far**3 - 2.25 * far**2 + 1
            weight = near if far <= 1 else -0.75 * (far**3 - 5 * far**2 + 8 * far - 4)
            weights[token, min(max(place, 0), side - 1)] += weight
    resized = torch.einsum("ab,cd,bde->ace", weights, weights, grid)
    return torch.cat([table[:, :1], resized.flatten(0, 1)[None].to(table.dtype)], dim=1)


@pytest.mark.parametrize("names", ["timm", "meta"])
@pytest.mark.parametrize("size_px", [42, 84, 98])
def test_without_registers_positions_are_resized_as_meta_does(tmp_path: Path, names: str, size_px: int) -> None:
    net = small_vit("dinov2-vit-s-14", img_size=70)
    torch.save(net.state_dict() if names == "timm" else metas_names(net.state_dict()), tmp_path / "dino.pth")
    metas = small_vit("dinov2-vit-s-14", img_size=size_px)
    state = net.state_dict()
    metas.load_state_dict(state | {"pos_embed": metas_positions(state["pos_embed"], size_px // 14)})
    teacher = load_teacher("dinov2-vit-s-14", TeacherOptions(weights=tmp_path / "dino.pth", size_px=size_px))
    assert_same(teacher, metas, size_px)
    assert teacher.spec.loaded["positions"].startswith(f"5 x 5 -> {size_px // 14} x {size_px // 14} as Meta")


@pytest.mark.parametrize("names", ["timm", "meta"])
@pytest.mark.parametrize(("name", "legacy_loading"), [("dinov2-vit-s-14-reg", False), ("dinov2-vit-s-14", True)])
def test_with_registers_and_for_caches_of_before_positions_are_resized_as_timm_does(
    tmp_path: Path, name: str, names: str, legacy_loading: bool
) -> None:
    net = small_vit(name, img_size=56)
    torch.save(net.state_dict() if names == "timm" else metas_names(net.state_dict()), tmp_path / "dino.pth")
    net.set_input_size((84, 84))
    options = TeacherOptions(weights=tmp_path / "dino.pth", size_px=84, legacy_loading=legacy_loading)
    teacher = load_teacher(name, options)
    assert_same(teacher, net, 84)
    assert bool(teacher.spec.loaded) != legacy_loading


def test_at_the_size_of_the_file_nothing_is_resized_or_recorded(tmp_path: Path) -> None:
    torch.save(small_vit("dinov2-vit-s-14").state_dict(), tmp_path / "dino.pth")
    teacher = load_teacher("dinov2-vit-s-14", TeacherOptions(weights=tmp_path / "dino.pth", size_px=56))
    assert teacher.spec.loaded == {}


def test_a_cache_of_before_keeps_its_positions(tmp_path: Path) -> None:
    torch.save(small_vit("dinov2-vit-s-14").state_dict(), tmp_path / "dino.pth")
    options = TeacherOptions(weights=tmp_path / "dino.pth", size_px=84)
    now, before = (load_teacher("dinov2-vit-s-14", replace(options, legacy_loading=old)) for old in (False, True))
    images = torch.randn(1, 3, 84, 84)
    with torch.inference_mode():
        for teacher in (now, before):
            again = load_recorded(teacher.spec)
            assert torch.equal(again(images).spatial, teacher(images).spatial)
        assert not torch.allclose(now(images).spatial, before(images).spatial, atol=1e-3)


def test_a_file_with_patches_of_another_size_is_the_network_it_says(tmp_path: Path) -> None:
    """A ViT-S/16 whose patches were once resampled to 14 pixels without a word."""
    torch.manual_seed(0)
    net = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0, init_values=1.0).eval()
    torch.save(net.state_dict(), tmp_path / "dino.pth")
    teacher = load_teacher("dinov2-vit-s-14", TeacherOptions(weights=tmp_path / "dino.pth", size_px=224))
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(teacher(images).spatial.flatten(1, 2), net.forward_features(images)[:, 1:])
    assert teacher.spec.geometry.stride_px == 16
    assert "patches of 16 px" in teacher.spec.model
    assert "patches of 16 px" in teacher.notes[0]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"teacher": state},
        lambda state: {"teacher": {f"backbone.{key}": value for key, value in state.items()}},
        lambda state: {"model": {f"teacher.backbone.{key}": value for key, value in state.items()}},
        lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}},
        lambda state: {"model": state, "args": argparse.Namespace(lr=1, out=Path("run")), "best": np.float64(0.5)},
        lambda state: {key.replace("blocks.", "blocks.0."): value for key, value in state.items()},
        lambda state: {"n_averaged": torch.tensor(3), **{f"module.{key}": value for key, value in state.items()}},
    ],
)
def test_ones_own_checkpoints_load(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    net = small_vit("dinov2-vit-s-14")
    torch.save(wrap(net.state_dict()), tmp_path / "dino.pth")
    assert_same(load_teacher("dinov2-vit-s-14", TeacherOptions(weights=tmp_path / "dino.pth", size_px=56)), net, 56)


def test_the_teacher_of_a_training_is_taken_and_named(tmp_path: Path) -> None:
    student, net = (small_vit("dinov2-vit-s-14", seed=seed).state_dict() for seed in (1, 2))
    joined = {f"student.backbone.{key}": value for key, value in student.items()}
    joined |= {f"teacher.backbone.{key}": value for key, value in net.items()}
    for saved, chosen in (({"student": student, "teacher": net}, "teacher"), ({"model": joined}, "teacher.backbone")):
        torch.save(saved, tmp_path / "dino.pth")
        teacher = load_teacher("dinov2-vit-s-14", TeacherOptions(weights=tmp_path / "dino.pth", size_px=56))
        assert_same(teacher, small_vit("dinov2-vit-s-14", seed=2), 56)
        assert teacher.spec.loaded == {"tensors": chosen}
        assert teacher.notes[0].startswith(f"the weights are those of '{chosen}'")


def test_two_networks_of_which_neither_is_the_one_are_refused(tmp_path: Path) -> None:
    state = small_vit("dinov2-vit-s-14").state_dict()
    torch.save(
        {f"{side}.{key}": value for key, value in state.items() for side in ("left", "right")}, tmp_path / "dino.pth"
    )
    with pytest.raises(TeacherWeightsError, match=r"several such networks \('left\.', 'right\.'\)"):
        load_teacher("dinov2-vit-s-14", TeacherOptions(weights=tmp_path / "dino.pth", size_px=56))


def test_a_table_of_positions_that_is_not_square_is_refused(tmp_path: Path) -> None:
    state = small_vit("dinov2-vit-s-14").state_dict()
    torch.save(state | {"pos_embed": torch.zeros(1, 1 + 4 * 3, 128)}, tmp_path / "dino.pth")
    with pytest.raises(TeacherWeightsError, match=r"pos_embed, of shape \(1, 13, 128\), which is not one for"):
        load_teacher("dinov2-vit-s-14", TeacherOptions(weights=tmp_path / "dino.pth", size_px=56))


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


@pytest.mark.parametrize("before", [True, False])
def test_a_build_goes_on_as_its_cache_began(tmp_path: Path, before: bool) -> None:
    """Caches made before specs said how positions were resized get no shards of another network."""
    torch.save(small_vit("dinov2-vit-s-14").state_dict(), tmp_path / "dino.pth")
    (tmp_path / "pics").mkdir()
    for number in range(4):
        Image.new("RGB", (90, 70), (60 * number, 20, 90)).save(tmp_path / "pics" / f"{number}.png")
    options = TeacherOptions(weights=tmp_path / "dino.pth", size_px=84, codec=CodecRecord(parameters={"name": "half"}))

    def build(count: int, *, legacy_loading: bool) -> dict[str, str]:
        teachers = {"dinov2-vit-s-14": replace(options, legacy_loading=legacy_loading)}
        config = BuildConfig(
            images=(str(tmp_path / "pics"),),
            teachers=teachers,
            out=tmp_path / "x.zarr",
            limit=count,
            shard_images=2,
            threads=1,
        )
        return build_cache(config).cache.teachers["dinov2-vit-s-14"].spec.loaded

    first = build(2, legacy_loading=before)
    assert bool(first) != before
    assert build(4, legacy_loading=False) == first
    cached = Cache(tmp_path / "x.zarr")
    report = recompute(cached, RecomputeConfig(teachers=("dinov2-vit-s-14",), count=4))
    assert report.teachers[0].complaints() == []
    assert report.teachers[0].cosine > 0.9999
