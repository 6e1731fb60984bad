"""A file that is not the teacher's: which tensors differ, in both shapes, and which teacher to ask for instead."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from segment_anything.modeling import ImageEncoderViT

from cache_builder.teachers import TeacherOptions, find_teacher, load_teacher
from cache_builder.teachers.clip_tower import published_tower
from cache_builder.teachers.wrong_weights import first_differences, likely_origin
from radio_cache.errors import TeacherWeightsError

StandIn = Callable[..., tuple[Any, Any]]


def zeros(state: dict[str, torch.Tensor], path: Path, prefix: str = "") -> Path:
    """The file of a network on the meta device: zeros, all of them views of one value, so that it is small."""
    one = torch.zeros(1)
    torch.save({prefix + key: one.expand(value.shape) for key, value in state.items()}, path)
    return path


def load(name: str, path: Path) -> None:
    load_teacher(name, TeacherOptions(weights=path))


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("dinov2-vit-s-14", "dinov2-vit-b-14"),
        ("dinov2-vit-g-14-reg", "dinov2-vit-s-14-reg"),
        ("dinov2", "dinov2-vit-l-14"),
    ],
)
def test_another_published_dinov2_is_refused_and_named(asked: str, given: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        net = timm.create_model(find_teacher(given).model, pretrained=False, num_classes=0)
    path = zeros(net.state_dict(), tmp_path / "w.pth")
    with pytest.raises(TeacherWeightsError) as caught:
        load(asked, path)
    message = str(caught.value)
    model = find_teacher(asked).model
    assert message.startswith(
        f"teacher '{asked}': {path} is not {model}: cls_token is (1, 1, {net.embed_dim}), needed is (1, 1,"
    )
    assert message.endswith(f"Its sizes are those of {given}: use --teacher {given}")
    assert message.count("needed is") == 3


def test_registers_alone_tell_two_dinov2_apart(tmp_path: Path) -> None:
    with torch.device("meta"):
        net = timm.create_model("vit_small_patch14_reg4_dinov2", pretrained=False, num_classes=0)
    with pytest.raises(TeacherWeightsError, match=r"use --teacher dinov2-vit-s-14-reg$"):
        load("dinov2-vit-s-14", zeros(net.state_dict(), tmp_path / "w.pth"))


def test_another_published_clip_is_refused_and_named(tmp_path: Path) -> None:
    with torch.device("meta"):
        tower = published_tower("ViT-L-14-336-quickgelu").build()
    path = zeros(tower.state_dict(), tmp_path / "w.pth", "visual.")
    with pytest.raises(
        TeacherWeightsError,
        match=r"is not ViT-H-14: class_embedding is \(1024,\), needed is \(1280,\); .* those of openai-clip-vit-l-14-336: use",
    ):
        load("openclip-vit-h-14", path)


def test_another_published_sam_is_refused_and_named(tmp_path: Path) -> None:
    with torch.device("meta"):
        encoder = ImageEncoderViT(
            depth=12,
            embed_dim=768,
            img_size=1024,
            num_heads=12,
            out_chans=256,
            use_rel_pos=True,
            window_size=14,
            qkv_bias=True,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            global_attn_indexes=(2, 5, 8, 11),
        )
    path = zeros(encoder.state_dict(), tmp_path / "w.pth", "image_encoder.")
    with pytest.raises(
        TeacherWeightsError,
        match=r"is not SAM vit_h: pos_embed is \(1, 64, 64, 768\), needed is \(1, 64, 64, 1280\); .* --teacher sam-vit-b$",
    ):
        load("sam", path)


@pytest.mark.parametrize(
    ("name", "foreign", "whose"),
    [
        ("dinov2-vit-s-14", "sam-vit-b", "SAM"),
        ("sam", "openclip-vit-h-14", "CLIP in open_clip's format"),
        ("clip", "dinov2-vit-s-14", "DINOv2"),
        ("clip", "siglip2-g-384", "an open_clip model with an image tower of timm"),
        ("siglip2-g-384", "sam-vit-b", "SAM"),
        ("dinov3-vit-s-16", "dinov2-vit-s-14", "DINOv2"),
        ("dinov3-vit-s-16", "dinov3-convnext-t", "a ConvNeXt in timm's format"),
        ("c-radio-v3-b", "timm:vit_base_patch16_224", "a ViT in timm's format"),
        ("efficientnet-lite0", "timm:resnet18", "a ResNet"),
        ("timm:resnet18", "sam-vit-b", "SAM"),
    ],
)
def test_a_file_of_another_family_says_whose_it_looks_like(
    name: str, foreign: str, whose: str, stand_in: StandIn, tmp_path: Path
) -> None:
    stand_in(foreign)
    path = tmp_path / f"{find_teacher(foreign).name}.pth"
    with pytest.raises(TeacherWeightsError, match=rf"teacher '.*': {path} .*\. It looks like {whose}"):
        load(name, path)


def test_formats_that_are_not_read_here_are_named() -> None:
    tensor = torch.zeros(1)
    assert "SAM 2 (no teacher" in likely_origin({"image_encoder.trunk.pos_embed": tensor})
    assert "format of transformers, which is not read here" in likely_origin({"vision_model.encoder.x": tensor})
    assert likely_origin({"something": tensor}) == ""


def test_differences_are_told_in_the_networks_order_and_not_all() -> None:
    own = {name: torch.zeros(2) for name in "dcba"}
    state = {name: torch.zeros(3, 1) for name in "abcd"}
    assert first_differences(own, state, limit=2) == ["d is (3, 1), needed is (2,)", "c is (3, 1), needed is (2,)"]


# ---------------------------------------------------------------- broken downloads


@pytest.mark.parametrize("kind", ["pth", "safetensors", "bin"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
@pytest.mark.parametrize("name", ["openclip-vit-h-14", "dinov3-vit-s-16", "sam-vit-b"])
def test_a_half_downloaded_file_is_named_with_its_size_and_the_cure(
    name: str, kind: str, share: float, stand_in: StandIn, tmp_path: Path
) -> None:
    _, network = stand_in(name)
    path = tmp_path / f"w.{kind}"
    if kind == "safetensors":
        save_file({key: value.contiguous() for key, value in network.state_dict().items()}, path)
    else:
        torch.save(network.state_dict(), path)
    load(name, path)
    part = path.read_bytes()[: int(path.stat().st_size * share)]
    path.write_bytes(part)
    with pytest.raises(
        TeacherWeightsError,
        match=rf"teacher '{name}': {path} cannot be read as weights: .*\. Its {len(part)} bytes are not the whole file, .* again",
    ):
        load(name, path)
