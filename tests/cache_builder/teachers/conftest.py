"""Small random stand-ins for teachers whose real networks are too large for a test, through the real classes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, _build_vision_tower
from segment_anything.modeling import ImageEncoderViT

from cache_builder.teachers import TeacherOptions, TeacherPreset, find_teacher, load_teacher
from cache_builder.teachers.base import Teacher
from cache_builder.teachers.clip_tower import published_tower

StandIn = Callable[..., Teacher]

_create_model = timm.create_model


def small_model(model: str, **arguments: Any) -> Any:
    """timm's class of that name, narrow and shallow, at its own input size."""
    if model.startswith("convnext"):
        arguments |= {"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64)}
    elif "vit" in model and not model.startswith("test_"):
        arguments |= {"embed_dim": 128, "depth": 2, "num_heads": 2}
    return _create_model(model, **arguments)


def randomised(net: Any, seed: int = 0) -> Any:
    """Every tensor random, so that none could be forgotten unnoticed."""
    torch.manual_seed(seed)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return net.eval()


def small_network(preset: TeacherPreset) -> Any:
    """A network that the preset's class can load: timm's, open_clip's, or segment-anything's."""
    match preset.family:
        case "clip" if published_tower(preset.model).config.timm_model_name is None:
            vision = CLIPVisionCfg(
                layers=2,
                width=64,
                head_width=64,
                image_size=preset.input_px,
                patch_size=published_tower(preset.model).config.patch_size,
            )
            text = CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=1)
            return CLIP(24, vision, text, quick_gelu="quickgelu" in preset.model)
        case "clip":
            tower = published_tower(preset.model)
            holder = torch.nn.Module()
            holder.visual = _build_vision_tower(128, tower.config)
            return holder
        case "dinov2":
            return small_model(preset.model, pretrained=False, num_classes=0, img_size=preset.input_px)
        case "sam":
            encoder = ImageEncoderViT(
                img_size=256,
                patch_size=16,
                embed_dim=64,
                depth=2,
                num_heads=2,
                mlp_ratio=4.0,
                out_chans=16,
                norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
                qkv_bias=True,
                use_rel_pos=True,
                window_size=5,
                global_attn_indexes=(1,),
            )
            holder = torch.nn.Module()
            holder.image_encoder = encoder
            return holder
        case _:
            choice = {} if preset.timm.global_pool is None else {"global_pool": preset.timm.global_pool}
            return timm.create_model(preset.model, pretrained=False, **choice)


@pytest.fixture
def small_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks timm for a network gets a small one; open_clip's towers that are timm's as well."""
    monkeypatch.setattr(timm, "create_model", small_model)


@pytest.fixture
def stand_in(small_timm: None, tmp_path: Path) -> StandIn:
    """A teacher by its name, with a small random network. What the library would build is its attribute `network`."""

    def load(name: str, **options: Any) -> tuple[Teacher, Any]:
        preset = find_teacher(name)
        if preset.weights.package:
            return load_teacher(name, TeacherOptions(**options)), None
        network = randomised(small_network(preset))
        path = tmp_path / f"{preset.name}.pth"
        torch.save(network.state_dict(), path)
        return load_teacher(name, TeacherOptions(weights=path, **options)), network

    return load
