"""Models of timm: small random networks of timm's own classes, in timm's names and in the authors', give timm's features."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

from cache_builder.teachers import TEACHERS, TeacherOptions, find_teacher, load_teacher
from cache_builder.teachers.base import Features, Teacher
from radio_cache.errors import ConfigError, TeacherWeightsError

See = Callable[[Teacher, Image.Image], torch.Tensor]
StandIn = Callable[..., tuple[Teacher, Any]]


def run(teacher: Teacher, size_px: int) -> tuple[torch.Tensor, Features]:
    images = torch.randn(2, 3, size_px, size_px)
    with torch.inference_mode():
        return images, teacher(images)


def assert_close(ours: torch.Tensor | None, theirs: torch.Tensor) -> None:
    assert ours is not None
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- features


@pytest.mark.parametrize("size_px", [256, 320])
@pytest.mark.parametrize("name", ["dinov3-vit-s-16", "dinov3-vit-s-plus-16", "dinov3-vit-7b-16"])
def test_dinov3_gives_class_and_patch_tokens_after_the_norm(name: str, size_px: int, stand_in: StandIn) -> None:
    teacher, net = stand_in(name, size_px=size_px)
    net.set_input_size((size_px, size_px))
    images, out = run(teacher, size_px)
    with torch.inference_mode():
        tokens = net.forward_features(images)
    assert_close(out.summary, tokens[:, 0])
    assert_close(out.spatial.flatten(1, 2), tokens[:, 5:])
    assert teacher.spec.summary_note == "class token after the final norm"


def test_dinov3_convnext_norms_its_map_as_its_pooled_features(stand_in: StandIn) -> None:
    teacher, net = stand_in("dinov3-convnext-t")
    images, out = run(teacher, 224)
    with torch.inference_mode():
        features = net.forward_features(images)
        assert_close(out.summary, net.forward_head(features, pre_logits=True))
        assert_close(out.spatial, net.head.norm(features).permute(0, 2, 3, 1))
        assert not torch.allclose(out.spatial, features.permute(0, 2, 3, 1))


@pytest.mark.parametrize("size_px", [512, 432])
@pytest.mark.parametrize(("name", "summaries", "prefix"), [("c-radio-v3-b", 3, 8), ("c-radio-v4-h", 2, 10)])
def test_c_radio_puts_its_summary_tokens_side_by_side(
    name: str, summaries: int, prefix: int, size_px: int, stand_in: StandIn
) -> None:
    """Positions are cut from a table for 2048 px at every size, so that no size is the network's own."""
    teacher, net = stand_in(name, size_px=size_px)
    images, out = run(teacher, size_px)
    with torch.inference_mode():
        tokens = net.forward_features(images)
    tokens = tokens["patches"] if isinstance(tokens, dict) else tokens
    assert_close(out.summary, tokens[:, :summaries].flatten(1))
    assert_close(out.spatial.flatten(1, 2), tokens[:, prefix:])


@pytest.mark.parametrize(
    "name", ["timm:resnet18", "timm:test_vit", "timm:efficientnet_b0", "timm:vit_base_patch16_siglip_224"]
)
def test_any_model_gives_what_its_classifier_reads_and_its_last_map(name: str, stand_in: StandIn) -> None:
    teacher, net = stand_in(name)
    images, out = run(teacher, teacher.spec.geometry.input_hw[0])
    with torch.inference_mode():
        pooled = net.forward_head(net.forward_features(images), pre_logits=True)
        maps = net.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)[0]
    assert_close(out.summary, pooled)
    assert_close(out.spatial, maps.permute(0, 2, 3, 1))


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize(
    "name",
    [
        "dinov3-vit-s-16",
        "dinov3-convnext-t",
        "c-radio-v3-b",
        "timm:resnet18.a1_in1k",
        "timm:test_vit.r160_in1k",
        "timm:convnext_atto.d2_in1k",
        "timm:convnext_base.fb_in22k_ft_in1k_384",
    ],
)
def test_pixels_are_bitwise_those_of_timms_transform(
    name: str, stand_in: StandIn, seen_by: See, photos: dict[str, Image.Image]
) -> None:
    teacher, _ = stand_in(name)
    config: Any = timm.get_pretrained_cfg(find_teacher(name).model)
    transform = create_transform(**resolve_data_config(pretrained_cfg=config.to_dict()))
    for photo_name, photo in photos.items():
        assert torch.equal(seen_by(teacher, photo)[0], transform(photo)), photo_name


# ---------------------------------------------------------------- files


def test_safetensors_and_another_number_of_classes_load(tmp_path: Path) -> None:
    net = timm.create_model("resnet18", pretrained=False, num_classes=7).eval()
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    teacher = load_teacher("timm:resnet18", TeacherOptions(weights=tmp_path / "w.safetensors"))
    images, out = run(teacher, 224)
    with torch.inference_mode():
        assert_close(out.summary, net.forward_head(net.forward_features(images), pre_logits=True))


def metas_names(state: dict[str, torch.Tensor], *, bias: float = 0.0) -> dict[str, torch.Tensor]:
    """The same weights as facebookresearch/dinov3 writes them: with a mask token, rotary periods, and biases of zero."""
    width = state["cls_token"].shape[-1]
    meta = {"mask_token": torch.zeros(1, width), "rope_embed.periods": torch.ones(16)}
    for key, value in state.items():
        for ours, theirs in (
            ("reg_token", "storage_tokens"),
            ("gamma_1", "ls1.gamma"),
            ("gamma_2", "ls2.gamma"),
        ):
            key = key.replace(ours, theirs)
        meta[key] = value
    for block in range(2):
        meta[f"blocks.{block}.attn.qkv.bias"] = torch.full((3 * width,), bias)
        meta[f"blocks.{block}.attn.qkv.bias_mask"] = torch.ones(3 * width)
    return meta


def test_metas_file_of_dinov3_loads(stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, net = stand_in("dinov3-vit-s-16")
    torch.save(metas_names(net.state_dict()), tmp_path / "meta.pth")
    metas = load_teacher("dinov3-vit-s-16", TeacherOptions(weights=tmp_path / "meta.pth"))
    images, out = run(teacher, 256)
    with torch.inference_mode():
        again = metas(images)
    assert torch.equal(out.spatial, again.spatial)
    assert capsys.readouterr().out == ""  # timm prints what it skips


def test_biases_that_timms_network_would_lose_are_refused(stand_in: StandIn, tmp_path: Path) -> None:
    _, net = stand_in("dinov3-vit-s-16")
    torch.save(metas_names(net.state_dict(), bias=0.5), tmp_path / "meta.pth")
    with pytest.raises(
        TeacherWeightsError,
        match=r"meta\.pth has biases in its attention .* --teacher timm:vit_small_patch16_dinov3_qkvb",
    ):
        load_teacher("dinov3-vit-s-16", TeacherOptions(weights=tmp_path / "meta.pth"))


def nvidias_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights as NVIDIA's `model.safetensors` has them, beside what is not the backbone."""
    tokens = torch.cat([state["embeds.cls_token"], state["embeds.reg_token"]], dim=1)[0]
    patches = state["embeds.proj.weight"].unflatten(1, (16, 16, 3))  # RADIO's patches are channel-major
    nvidia = {
        "radio_model.summary_idxs": torch.tensor([0, 1, 2]),
        "radio_model.input_conditioner.norm_mean": torch.zeros(3, 1, 1),
        "radio_model.model.patch_generator.cls_token.token": tokens,
        "radio_model.model.patch_generator.embedder.weight": patches.permute(0, 3, 1, 2).flatten(1),
        "radio_model.model.patch_generator.pos_embed": state["embeds.pos_embed"].flatten(1, 2),
    }
    return nvidia | {f"radio_model.model.{key}": value for key, value in state.items() if key.startswith("blocks.")}


def test_nvidias_file_of_c_radio_loads(stand_in: StandIn, tmp_path: Path) -> None:
    teacher, net = stand_in("c-radio-v3-b", size_px=192)
    state = nvidias_names(net.state_dict())
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    nvidias = load_teacher("c-radio-v3-b", TeacherOptions(weights=tmp_path / "model.safetensors", size_px=192))
    net.embeds.proj.bias.data.zero_()  # RADIO's embedding has none
    images = torch.randn(1, 3, 192, 192)
    with torch.inference_mode():
        tokens = net.forward_features(images)
        out = nvidias(images)
    tokens = tokens["patches"] if isinstance(tokens, dict) else tokens
    assert_close(out.spatial.flatten(1, 2), tokens[:, 8:])
    assert nvidias.spec.geometry == teacher.spec.geometry


def test_nvidias_file_says_itself_which_tokens_are_the_summary(stand_in: StandIn, tmp_path: Path) -> None:
    teacher, net = stand_in("c-radio-v3-b", size_px=192)
    state = nvidias_names(net.state_dict()) | {"radio_model.summary_idxs": torch.tensor([1, 3])}
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    told = load_teacher("c-radio-v3-b", TeacherOptions(weights=tmp_path / "model.safetensors", size_px=192))
    assert told.spec.summary_dim == 2 * told.spec.spatial_dim
    assert told.spec.summary_note == "summary tokens 1, 3, side by side"
    assert teacher.spec.summary_dim == 3 * teacher.spec.spatial_dim


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_c_radio_as_transformers_saves_it_loads_if_its_layer_scales_are_one(
    scale: float, stand_in: StandIn, tmp_path: Path
) -> None:
    _, network = stand_in("c-radio-v3-b", size_px=192)
    state = nvidias_names(network.state_dict())
    torch.save(state, tmp_path / "nvidia.pth")
    for block in range(2):
        for number in (1, 2):
            state[f"radio_model.model.blocks.{block}.layer_scale{number}.lambda1"] = torch.full((128,), scale)
    torch.save(state, tmp_path / "saved.pth")
    if scale != 1:
        with pytest.raises(
            TeacherWeightsError, match=r"layer scales other than one \(radio_model.model.blocks.0.layer_scale1"
        ):
            load_teacher("c-radio-v3-b", TeacherOptions(weights=tmp_path / "saved.pth", size_px=192))
        return
    images = torch.randn(1, 3, 192, 192)
    with torch.inference_mode():
        saved, nvidias = (
            load_teacher("c-radio-v3-b", TeacherOptions(weights=tmp_path / f"{name}.pth", size_px=192))
            for name in ("saved", "nvidia")
        )
        assert torch.equal(saved(images).spatial, nvidias(images).spatial)
    assert saved.notes == ("timm fills in embeds.proj.bias, which the file does not have",)


# ---------------------------------------------------------------- what cannot be


def test_a_file_of_another_size_names_the_tensors_with_both_shapes(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet10t", pretrained=False).state_dict(), tmp_path / "w.pth")
    with pytest.raises(
        TeacherWeightsError, match=r"does not fit the network: .* of another shape \(such as .* is \(.*\), need"
    ):
        load_teacher("timm:resnet18", TeacherOptions(weights=tmp_path / "w.pth"))


def test_a_size_the_network_cannot_take_is_refused(stand_in: StandIn) -> None:
    with pytest.raises(
        ConfigError, match=r"teacher 'dinov3-vit-s-16', .* cannot take 250 px: .*Its own size is 256 px"
    ):
        stand_in("dinov3-vit-s-16", size_px=250)


def test_every_preset_of_timm_names_weights_that_timm_knows() -> None:
    for preset in TEACHERS.values():
        if preset.family in ("dinov3", "c-radio"):
            config = timm.get_pretrained_cfg(preset.model)
            assert config is not None
            assert preset.weights.hub is not None
            assert config.hf_hub_id == preset.weights.hub[0]


@pytest.mark.parametrize("size_px", [192, 512])
def test_c_radio_v4_is_that_of_transformers(size_px: int, stand_in: StandIn, tmp_path: Path) -> None:
    """Both resize positions without align_corners; timm's v3-B and v3-H with it, as NVIDIA released them."""
    radio = pytest.importorskip("transformers.models.radio", exc_type=ImportError)
    _, network = stand_in("c-radio-v4-h", size_px=size_px)
    state = nvidias_names(network.state_dict())
    state["radio_model.summary_idxs"] = torch.tensor([0, 1])
    state["radio_model.input_conditioner.norm_std"] = torch.ones(3, 1, 1)
    (tmp_path / "radio").mkdir()
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "radio" / "model.safetensors")
    width = network.embeds.cls_token.shape[-1]
    config = radio.RadioConfig(hidden_size=width, num_hidden_layers=2, num_attention_heads=2)
    config.save_pretrained(tmp_path / "radio")
    theirs = radio.RadioModel.from_pretrained(tmp_path / "radio", attn_implementation="eager").eval()
    teacher = load_teacher(
        "c-radio-v4-h", TeacherOptions(weights=tmp_path / "radio" / "model.safetensors", size_px=size_px)
    )
    images = torch.rand(1, 3, size_px, size_px)
    with torch.inference_mode():
        ours, out = teacher(images), theirs(images)
    tokens = (
        out.last_hidden_state
        if out.last_hidden_state.shape[1] == (size_px // 16) ** 2
        else out.last_hidden_state[:, 10:]
    )
    torch.testing.assert_close(ours.spatial.flatten(1, 2), tokens, atol=1e-4, rtol=1e-4)
