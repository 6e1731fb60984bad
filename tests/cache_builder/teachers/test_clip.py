"""CLIP: a small random model of open_clip's own class gives the same features through our loader and through theirs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, resize_pos_embed
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file

from cache_builder.teachers import TeacherOptions, TeacherPreset, find_teacher, load_recorded, load_teacher
from cache_builder.teachers.base import Teacher
from cache_builder.teachers.clip_tower import published_tower
from cache_builder.teachers.presets import CLIPS
from radio_cache.errors import TeacherWeightsError

StandIn = Callable[..., tuple[Teacher, Any]]
See = Callable[[Teacher, Image.Image], torch.Tensor]

PUBLISHED_TAGS = {
    "dfn-clip-vit-h-14-378": "dfn5b",
    "openai-clip-vit-l-14-336": "openai",
    "openclip-vit-h-14": "laion2b_s32b_b79k",
    "metaclip-vit-h-14": "metaclip_fullcc",
    "siglip2-g-384": "webli",
}
"""open_clip's name of the weights that a preset downloads, which decides the preprocessing."""


def small_clip(*, image_size: int = 56, quick_gelu: bool = False, seed: int = 0) -> CLIP:
    """Three layers of 64, one head, patches of 14; every tensor random, so that none could be forgotten unnoticed."""
    vision = CLIPVisionCfg(layers=3, width=64, head_width=64, patch_size=14, image_size=image_size, mlp_ratio=4.0)
    text = CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=1)
    torch.manual_seed(seed)
    model = CLIP(24, vision, text, quick_gelu=quick_gelu).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def randomised(net: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return net.eval()


def load(path: Path, name: str = "openclip-vit-h-14", size_px: int | None = None) -> Teacher:
    return load_teacher(name, TeacherOptions(weights=path, size_px=size_px))


def theirs(model: CLIP, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(pooled, tokens) of open_clip's own forward."""
    model.visual.output_tokens = True
    with torch.inference_mode():
        pooled, tokens = model.visual(images)
    model.visual.output_tokens = False
    torch.testing.assert_close(pooled, model.encode_image(images).detach())
    return pooled, tokens


def assert_same(teacher: Teacher, images: torch.Tensor, model: CLIP) -> None:
    pooled, tokens = theirs(model, images)
    with torch.inference_mode():
        out = teacher(images)
    h, w = teacher.spec.geometry.grid_hw
    assert out.summary is not None
    assert out.summary.shape == (len(images), teacher.spec.summary_dim)
    assert out.spatial.shape == (len(images), h, w, teacher.spec.spatial_dim)
    torch.testing.assert_close(out.summary, pooled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.spatial.flatten(1, 2), tokens, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_features_are_those_of_open_clips_own_forward(tmp_path: Path, kind: str) -> None:
    model = small_clip()
    path = tmp_path / f"clip.{kind}"
    if kind == "pt":
        torch.save(model.state_dict(), path)
    else:
        save_file(model.state_dict(), path)
    assert_same(load(path), torch.randn(2, 3, 56, 56), model)


@pytest.mark.parametrize(("name", "quick_gelu"), [("openclip-vit-h-14", False), ("metaclip-vit-h-14", True)])
def test_the_activation_is_the_presets(tmp_path: Path, name: str, quick_gelu: bool) -> None:
    model = small_clip(quick_gelu=quick_gelu)
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    images = torch.randn(1, 3, 56, 56)
    assert_same(load(tmp_path / "clip.pt", name), images, model)
    with pytest.raises(AssertionError):
        assert_same(load(tmp_path / "clip.pt", name), images, small_clip(quick_gelu=not quick_gelu))


def test_another_size_resizes_the_position_embedding_as_open_clip_does(tmp_path: Path) -> None:
    torch.save(small_clip(image_size=56).state_dict(), tmp_path / "clip.pt")
    larger = small_clip(image_size=84, seed=1)
    state = small_clip(image_size=56).state_dict()
    resize_pos_embed(state, larger)
    larger.load_state_dict(state)
    assert_same(load(tmp_path / "clip.pt", size_px=84), torch.randn(1, 3, 84, 84), larger)


def test_weights_that_are_not_the_published_ones_are_told(tmp_path: Path) -> None:
    torch.save(small_clip().state_dict(), tmp_path / "clip.pt")
    (note,) = load(tmp_path / "clip.pt").notes
    assert note == (
        "these weights are not the published ViT-H-14: width 64, 3 layers, 56 px; heads of 64 are assumed, "
        "as open_clip does"
    )


def test_a_tensor_too_few_or_too_many_is_named(tmp_path: Path) -> None:
    state = small_clip().state_dict()
    lacking = {key: value for key, value in state.items() if key != "visual.ln_post.bias"}
    torch.save(lacking, tmp_path / "few.pt")
    with pytest.raises(
        TeacherWeightsError, match=r"few\.pt does not fit the network: 1 tensors missing .*ln_post\.bias"
    ):
        load(tmp_path / "few.pt")
    torch.save({**state, "visual.extra": torch.zeros(2)}, tmp_path / "many.pt")
    with pytest.raises(TeacherWeightsError, match=r"1 tensors too many \(such as extra\)"):
        load(tmp_path / "many.pt")


@pytest.mark.parametrize("preset", CLIPS, ids=lambda preset: preset.name)
def test_a_preset_is_a_model_of_open_clip_with_its_own_size(preset: TeacherPreset) -> None:
    config = open_clip.get_model_config(preset.model)
    assert config is not None
    assert config["vision_cfg"]["image_size"] == preset.input_px
    assert PUBLISHED_TAGS[preset.name] in open_clip.list_pretrained_tags_by_model(preset.model)
    assert PUBLISHED_TAGS[preset.name] == preset.tag


@pytest.mark.parametrize("preset", CLIPS, ids=lambda preset: preset.name)
def test_pixels_are_bitwise_those_of_open_clips_transform_for_the_published_weights(
    preset: TeacherPreset, stand_in: StandIn, seen_by: See, photos: dict[str, Image.Image]
) -> None:
    teacher, _ = stand_in(preset.name)
    published = open_clip.get_pretrained_cfg(preset.model, PUBLISHED_TAGS[preset.name])
    known = {key: published[key] for key in ("mean", "std", "interpolation", "resize_mode") if published.get(key)}
    transform = image_transform_v2(PreprocessCfg(size=preset.input_px, **known), is_train=False)
    for name, photo in photos.items():
        assert torch.equal(seen_by(teacher, photo)[0], transform(photo)), name


@pytest.mark.parametrize("size_px", [384, 256])
def test_siglip_2_gives_the_features_of_open_clips_own_tower(stand_in: StandIn, size_px: int) -> None:
    """Its image tower is a network of timm inside open_clip: pooled by attention, and resized once it is loaded."""
    teacher, holder = stand_in("siglip2-g-384", size_px=size_px)
    tower = holder.visual
    if size_px != 384:
        tower.set_input_size(size_px)
    images = torch.randn(1, 3, size_px, size_px)
    with torch.inference_mode():
        out, pooled, tokens = teacher(images), tower(images), tower.trunk.forward_features(images)
    assert out.summary is not None
    torch.testing.assert_close(out.summary, pooled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.spatial.flatten(1, 2), tokens, atol=1e-5, rtol=1e-5)
    assert teacher.spec.geometry.stride_px == 16


@pytest.mark.parametrize(
    ("name", "grid", "stride", "offset"),
    [
        ("open_clip:ViT-B-32/laion2b_e16", 7, 32, 16),
        ("open_clip:RN50/openai", 7, 32, 15.5),
        ("open_clip:convnext_base/laion400m_s13b_b51k", 7, 32, 16),
        ("open_clip:coca_ViT-B-32/laion2b_s13b_b90k", 7, 32, 16),
        ("open_clip:ViT-B-16-SigLIP", 14, 16, 8),
    ],
)
def test_any_model_of_open_clip_is_a_teacher(
    name: str,
    grid: int,
    stride: float,
    offset: float,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    small_timm: None,
) -> None:
    """Plain ViT, ResNet, a convolutional network of timm, attentional pooling, a ViT of timm; all through `open_clip:`."""
    preset = find_teacher(name)
    tower = published_tower(preset.model)
    narrow = replace(
        tower,
        embed_dim=64,
        config=replace(
            tower.config,
            width=64,
            layers=tower.config.layers if isinstance(tower.config.layers, list) else 2,
            head_width=64 if not isinstance(tower.config.layers, list) else 32,
        ),
    )
    monkeypatch.setattr("cache_builder.teachers.clip_tower.published_tower", lambda model: narrow)
    net = randomised(narrow.build())
    torch.save({f"visual.{key}": value for key, value in net.state_dict().items()}, tmp_path / "w.pt")
    teacher = load_teacher(name, TeacherOptions(weights=tmp_path / "w.pt"))
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        out, expected = teacher(images), net(images)
    assert out.summary is not None
    torch.testing.assert_close(
        out.summary, expected[0] if isinstance(expected, tuple) else expected, atol=1e-5, rtol=1e-5
    )
    geometry = teacher.spec.geometry
    assert (geometry.grid_hw, geometry.stride_px, geometry.offset_px) == ((grid, grid), stride, offset)
    assert teacher.spec.model == name
    assert load_recorded(teacher.spec).spec == teacher.spec


def test_the_two_ways_to_fit_an_image_are_both_among_the_presets() -> None:
    assert {preset.fit for preset in CLIPS} == {"crop", "squash"}
