"""The network that a file holds is the one that runs: nothing is resampled, swapped or left out without a word."""

import logging
import resource
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from cache_builder.teachers import TeacherOptions, load_recorded, load_teacher
from cache_builder.teachers.clip_tower import published_tower, trained_with_quick_gelu
from cache_builder.teachers.state_dict import load_exactly, read_weights_file
from cache_builder.teachers.traced_conversion import traced_conversion
from radio_cache.errors import TeacherWeightsError

StandIn = Callable[..., tuple[Any, Any]]


def load(name: str, path: Path, **options: Any) -> Any:
    return load_teacher(name, TeacherOptions(weights=path, **options))


# ---------------------------------------------------------------- resampled


def test_patches_of_another_size_are_refused_with_both_shapes(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit2").state_dict(), tmp_path / "w.pth")
    other = timm.create_model("test_vit2", patch_size=32).state_dict()
    torch.save(other, tmp_path / "other.pth")
    load("timm:test_vit2", tmp_path / "w.pth")
    shape = tuple(other["patch_embed.proj.weight"].shape)
    with pytest.raises(TeacherWeightsError) as caught:
        load("timm:test_vit2", tmp_path / "other.pth")
    assert f"patch_embed.proj.weight is {shape}, needed is {(*shape[:2], 16, 16)}" in str(caught.value)


@pytest.mark.parametrize("own_px", [160, 224])
def test_positions_may_be_resized_and_are_recorded(own_px: int, tmp_path: Path) -> None:
    net = timm.create_model("test_vit", img_size=own_px).eval()
    torch.save(net.state_dict(), tmp_path / "w.pth")
    teacher = load("timm:test_vit", tmp_path / "w.pth", size_px=224)
    net.set_input_size((224, 224))
    images = torch.randn(1, 3, 224, 224)
    assert ("positions" in teacher.spec.loaded) == (own_px != 224)
    # A file of 224 px asked for at 224 px is not brought to the 160 px of the model's name and back.
    with torch.inference_mode():
        maps = net.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)[0]
        torch.testing.assert_close(teacher(images).spatial, maps.permute(0, 2, 3, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "adapter", ["lora.0.A", "w_As.0.weight", "w_a_000.weight", "prompt_embeddings", "adapters.0.down"]
)
def test_adapters_beside_a_network_are_not_left_out_without_a_word(adapter: str, tmp_path: Path) -> None:
    state = {f"backbone.{key}": value for key, value in timm.create_model("test_vit").state_dict().items()}
    torch.save({**state, "linear_head.weight": torch.zeros(3, 64)}, tmp_path / "head.pth")
    load("timm:test_vit", tmp_path / "head.pth")
    torch.save({**state, adapter: torch.zeros(4, 64)}, tmp_path / "w.pth")
    with pytest.raises(
        TeacherWeightsError, match=f"1 tensors of adapters or prompts \\(such as {adapter}\\).*merge them"
    ):
        load("timm:test_vit", tmp_path / "w.pth")


def test_adapters_in_the_names_are_to_be_merged_and_shards_to_be_joined(tmp_path: Path) -> None:
    state = timm.create_model("test_vit").state_dict()
    torch.save({**state, "blocks.0.attn.qkv.lora_A": torch.zeros(4, 64)}, tmp_path / "w.pth")
    with pytest.raises(TeacherWeightsError, match="have to be merged into the weights first"):
        load("timm:test_vit", tmp_path / "w.pth")
    for name, whole in (("model-00001-of-00001.safetensors", True), ("model-00001-of-00002.safetensors", False)):
        save_file(state, tmp_path / name)
        if whole:
            load("timm:test_vit", tmp_path / name)
        else:
            with pytest.raises(TeacherWeightsError, match="one of several files"):
                load("timm:test_vit", tmp_path / name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_clip_in_half_precision_takes_another_size(dtype: torch.dtype, tmp_path: Path) -> None:
    net = open_clip.create_model("ViT-B-32", vision_cfg={"layers": 1, "width": 64, "image_size": 96, "patch_size": 32})
    visual = {key: value for key, value in net.state_dict().items() if key.startswith("visual.")}
    torch.save({key: value.to(dtype) for key, value in visual.items()}, tmp_path / "half.pt")
    torch.save({key: value.to(dtype).float() for key, value in visual.items()}, tmp_path / "single.pt")
    images = torch.randn(1, 3, 160, 160)
    maps = [
        load("open_clip:ViT-B-32", tmp_path / name, size_px=160)(images).spatial for name in ("half.pt", "single.pt")
    ]
    torch.testing.assert_close(maps[0], maps[1])


def test_a_dinov2_in_half_precision_resizes_its_positions_in_single(tmp_path: Path) -> None:
    net = timm.create_model("vit_small_patch14_dinov2", embed_dim=64, depth=1, num_heads=1, img_size=98)
    torch.save({key: value.bfloat16() for key, value in net.state_dict().items()}, tmp_path / "half.pt")
    torch.save({key: value.bfloat16().float() for key, value in net.state_dict().items()}, tmp_path / "single.pt")
    images = torch.randn(1, 3, 112, 112)
    maps = [load("dinov2-vit-s-14", tmp_path / name, size_px=112)(images).spatial for name in ("half.pt", "single.pt")]
    torch.testing.assert_close(maps[0], maps[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_embed.proj.weight": torch.zeros(64, 3, 14, 7)}, "not one of square patches"),  # timm resamples such
        ({"patch_embed.proj.weight": torch.zeros(64)}, "not one of square patches"),
        ({"blocks.x.weight": torch.zeros(4)}, "cannot be built with"),
        (
            {"reg_token": torch.zeros(1, 4, 64)},
            "cannot be built with",
        ),  # Meta's positions with timm's name of registers
    ],
)
def test_a_dinov2_that_is_none_is_refused_in_a_sentence(
    change: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    net = timm.create_model("vit_small_patch14_dinov2", embed_dim=64, depth=1, num_heads=1, img_size=98)
    torch.save({**net.state_dict(), **change}, tmp_path / "w.pth")
    with pytest.raises(TeacherWeightsError, match=message):
        load("dinov2-vit-s-14", tmp_path / "w.pth", size_px=112)


def test_a_conversion_is_watched_through_views_and_changes_in_place() -> None:
    state = {"a": torch.arange(6.0), "b": torch.ones(2, 2), "c": torch.ones(1, 1, 4, 4), "unused": torch.ones(3)}

    def convert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        joined = torch.cat([tensors["a"].reshape(2, 3).t().flatten(), tensors["b"].flatten()])
        in_place = torch.zeros(2)
        in_place[:] = tensors["b"][0]
        resized = torch.nn.functional.interpolate(tensors["c"], (2, 2), mode="bicubic")
        return {"joined": joined, "in_place": in_place, "resized": resized, "made": torch.zeros(2)}

    done = traced_conversion(convert, state, names=["joined", "in_place", "resized", "made", "absent"])
    assert (done.resampled, done.filled, done.unused) == (["resized"], ["made"], ["unused"])


def test_what_a_conversion_leaves_out_is_said_and_recorded(tmp_path: Path) -> None:
    state = timm.create_model("test_vit").state_dict() | {"pre_logits.fc.weight": torch.ones(4, 4)}
    torch.save(state, tmp_path / "w.pth")
    teacher = load("timm:test_vit", tmp_path / "w.pth")
    assert teacher.notes == ("timm leaves out pre_logits.fc.weight of the file",)
    assert teacher.spec.loaded == {"left_out": "pre_logits.fc.weight"}


def test_integers_of_a_quantised_network_are_no_weights() -> None:
    net = torch.nn.Linear(2, 2)
    state = net.state_dict() | {"weight": torch.ones(2, 2, dtype=torch.int8)}
    with pytest.raises(TeacherWeightsError, match=r"1 of another kind \(such as weight is torch.int8"):
        load_exactly(net, state, teacher="t", path=Path("w.pth"))


# ---------------------------------------------------------------- several sets


@pytest.mark.parametrize("averaged", ["state_dict_ema", "model_ema"])
@pytest.mark.parametrize("raw", ["state_dict", "model"])
def test_averaged_weights_are_taken_as_timm_takes_them_and_named(raw: str, averaged: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    nets = [timm.create_model("resnet18", num_classes=3) for _ in range(2)]
    torch.save({raw: nets[0].state_dict(), averaged: nets[1].state_dict(), "epoch": 2}, tmp_path / "w.pth")
    teacher = load("timm:resnet18", tmp_path / "w.pth")
    timms = timm.create_model("resnet18", num_classes=3, checkpoint_path=str(tmp_path / "w.pth"))
    assert torch.equal(teacher._net.conv1.weight, timms.conv1.weight)
    assert torch.equal(teacher._net.conv1.weight, nets[1].conv1.weight)
    assert teacher.spec.loaded == {"tensors": averaged}
    assert teacher.notes == (f"the weights are those of '{averaged}'; the file also holds '{raw}'",)
    before = load("timm:resnet18", tmp_path / "w.pth", legacy_loading=True)
    assert torch.equal(load_recorded(before.spec)._net.conv1.weight, nets[0].conv1.weight)
    assert torch.equal(load_recorded(teacher.spec)._net.conv1.weight, nets[1].conv1.weight)


def test_an_optimisers_state_is_no_set_of_weights(tmp_path: Path) -> None:
    state = {"model": {"a": torch.ones(1)}, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}}
    torch.save(state, tmp_path / "w.pth")
    file = read_weights_file(tmp_path / "w.pth", teacher="t")
    assert (list(file.tensors), file.chosen) == (["a"], "")


def test_settings_and_counts_beside_the_weights_are_passed_over(tmp_path: Path) -> None:
    counts: defaultdict[str, Any] = defaultdict(dict, {"step": {"loss": torch.ones(1)}})
    beside = {"best": np.float64(1), "history": np.arange(3), "state": counts, "took": timedelta(1), "out": Path("run")}
    torch.save({"state_dict": {"a": torch.ones(1)}, **beside}, tmp_path / "w.pth")
    assert list(read_weights_file(tmp_path / "w.pth", teacher="t").tensors) == ["a"]


def test_an_encoder_of_momentum_is_not_taken_for_the_one(tmp_path: Path) -> None:
    """MoCo evaluates the other one."""
    state = timm.create_model("test_vit").state_dict()
    joined = {f"module.{side}_encoder.{key}": value for key, value in state.items() for side in ("base", "momentum")}
    torch.save({"state_dict": joined}, tmp_path / "w.pth")
    with pytest.raises(TeacherWeightsError, match=r"several such networks \('base_encoder\.', 'momentum_encoder\.'\)"):
        load("timm:test_vit", tmp_path / "w.pth")


def test_sets_of_unknown_names_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"left": {"a": torch.ones(1)}, "right": {"a": torch.ones(1)}}, tmp_path / "w.pth")
    with pytest.raises(TeacherWeightsError, match="several sets of tensors \\('left', 'right'\\)"):
        read_weights_file(tmp_path / "w.pth", teacher="t")


# ---------------------------------------------------------------- QuickGELU


def test_every_pair_of_open_clip_runs_the_activation_it_was_trained_with() -> None:
    """From open_clip's own table: what an entry says itself counts, or else what its model says."""
    wrong = []
    for model, tag in open_clip.list_pretrained():
        entry = open_clip.get_pretrained_cfg(model, tag)
        of_model = bool((open_clip.get_model_config(model) or {}).get("quick_gelu"))
        if trained_with_quick_gelu(model, tag) != entry.get("quick_gelu", of_model):
            wrong.append((model, tag))
    assert wrong == []
    assert trained_with_quick_gelu("ViT-B-32", "openai")
    assert not trained_with_quick_gelu("ViT-B-32", "laion2b_e16")
    assert trained_with_quick_gelu("ViT-H-14-quickgelu", "dfn5b")


@pytest.mark.parametrize("tag", ["openai", "laion400m_e32", "laion2b_e16"])
def test_a_clip_is_open_clips_own_with_the_right_activation(tag: str, tmp_path: Path) -> None:
    logging.disable(logging.WARNING)
    try:
        whole = open_clip.create_model("ViT-B-32", force_quick_gelu=tag != "laion2b_e16").eval()
    finally:
        logging.disable(logging.NOTSET)
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    teacher = load(f"open_clip:ViT-B-32/{tag}", tmp_path / "w.pth")
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(teacher(images).summary, whole.encode_image(images), atol=1e-5, rtol=1e-5)
    assert teacher.spec.loaded == ({} if tag == "laion2b_e16" else {"activation": "QuickGELU"})
    if tag == "openai":
        before = load(f"open_clip:ViT-B-32/{tag}", tmp_path / "w.pth", legacy_loading=True)
        assert load_recorded(before.spec).spec == before.spec
        with torch.inference_mode():
            assert not torch.allclose(before(images).summary, teacher(images).summary, atol=1e-4)


def test_a_clip_whose_positions_are_no_square_is_refused(tmp_path: Path) -> None:
    state = published_tower("ViT-B-32").build().state_dict()
    state["positional_embedding"] = torch.zeros(1 + 7 * 6, 768)
    torch.save({f"visual.{key}": value.half() for key, value in state.items()}, tmp_path / "w.pth")
    with pytest.raises(
        TeacherWeightsError, match=r"table of 43 positions, which is not one for a class token and a square"
    ):
        load("open_clip:ViT-B-32", tmp_path / "w.pth")


# ---------------------------------------------------------------- SAM's look-alikes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s | {"image_encoder.pos_embed": torch.zeros(1, 257, 64)},
            r"pos_embed is \(1, 257, 64\), .*EfficientSAM",
        ),
        (
            lambda s: s | {"image_encoder.pos_embed": torch.zeros(1, 16, 12, 64)},
            r"pos_embed is \(1, 16, 12, 64\), needed is",
        ),
        (
            lambda s: {k: v for k, v in s.items() if "rel_pos" not in k},
            r"attn.rel_pos_h is missing; without relative",
        ),
        (lambda s: {k: v for k, v in s.items() if "blocks.0." not in k}, "no complete row of blocks"),
        (lambda s: {k: v for k, v in s.items() if "lin1" not in k}, r"blocks\.0\.mlp\.lin1\.weight is missing"),
        (lambda s: {k: v for k, v in s.items() if "patch_embed" not in k}, r"patch_embed\.proj\.weight is missing"),
    ],
)
def test_what_only_resembles_sam_is_refused_by_what_differs(
    change: Callable[[Any], Any], message: str, stand_in: StandIn, tmp_path: Path
) -> None:
    _, network = stand_in("sam-vit-b")
    torch.save(change(network.state_dict()), tmp_path / "w.pth")
    with pytest.raises(TeacherWeightsError, match=rf"is not an image encoder of segment-anything: .*{message}"):
        load("sam-vit-b", tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["sam-vit-b", "openclip-vit-h-14"])
@pytest.mark.parametrize("prefix", ["model.", "module.net.", "_orig_mod."])
def test_sam_and_clip_within_another_module_load(name: str, prefix: str, stand_in: StandIn, tmp_path: Path) -> None:
    teacher, network = stand_in(name)
    torch.save({"state_dict": {prefix + key: value for key, value in network.state_dict().items()}}, tmp_path / "w.pth")
    images = torch.randn(1, 3, *teacher.spec.geometry.input_hw)
    with torch.inference_mode():
        assert torch.equal(load(name, tmp_path / "w.pth")(images).spatial, teacher(images).spatial)


# ---------------------------------------------------------------- files


def test_safetensors_behind_a_link_without_an_ending_load(tmp_path: Path) -> None:
    """As every file of the Hugging Face cache lies."""
    net = timm.create_model("resnet18")
    save_file(net.state_dict(), tmp_path / "blob")
    (tmp_path / "model.safetensors").symlink_to("blob")
    for name in ("model.safetensors", "blob"):
        teacher = load("timm:resnet18", tmp_path / name)
        assert torch.equal(teacher._net.conv1.weight, net.conv1.weight)
        assert teacher.spec.weights == str(tmp_path / name)


def test_a_file_that_may_not_be_read_just_now_is_not_called_broken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pth")

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", denied)
    with pytest.raises(
        TeacherWeightsError, match=r"cannot be read just now: Permission denied. The file itself may be whole"
    ):
        read_weights_file(tmp_path / "w.pth", teacher="t")


_TOO_LITTLE = """
import resource, sys
from pathlib import Path
from cache_builder.teachers import TeacherOptions, load_teacher
from radio_cache.errors import TeacherWeightsError
import cache_builder.teachers.timm_model
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 60_000_000,) * 2)
try:
    load_teacher("timm:resnet50", TeacherOptions(weights=Path(sys.argv[1])))
except TeacherWeightsError as exc:
    print(exc)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_too_little_memory_is_not_a_broken_file(kind: str, tmp_path: Path) -> None:
    assert resource.RLIMIT_AS
    state = timm.create_model("resnet50").state_dict()
    path = tmp_path / f"w.{kind}"
    torch.save(state, path) if kind == "pth" else save_file(state, path)
    done = subprocess.run([sys.executable, "-c", _TOO_LITTLE, str(path)], capture_output=True, text=True, check=False)
    assert "too little memory for the weights in" in done.stdout, done.stderr[-500:]
    assert "fetch it again" not in done.stdout


def test_coca_gives_its_embedding_and_the_tokens_before_its_pooling(tmp_path: Path) -> None:
    net = published_tower("coca_ViT-B-32").build()
    torch.save({f"visual.{key}": value for key, value in net.state_dict().items()}, tmp_path / "w.pth")
    teacher = load("open_clip:coca_ViT-B-32", tmp_path / "w.pth")
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        out, embedding = teacher(images), net(images)[0]
        blocks = net.forward_intermediates(images, indices=1, output_fmt="NCHW")["image_intermediates"][0]
    torch.testing.assert_close(out.summary, embedding, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.spatial, blocks.permute(0, 2, 3, 1), atol=1e-5, rtol=1e-5)
    assert teacher.spec.spatial_note == "patch tokens of the last block, before attentional pooling"


# ---------------------------------------------------------------- heads

HEADS = (
    "repvit_m0_9",
    "shvit_s1",
    "efficientvit_m0",
    "iformer_t",
    "tiny_vit_5m_224",
    "caformer_s18",
    "convformer_s18",
    "fastvit_t8",
    "deit_tiny_distilled_patch16_224",
    "mobilenetv3_small_050",
    "test_convnext",
)
"""timm's models whose heads differ: several layers, two heads, none of a usual name."""


@pytest.mark.parametrize("model", HEADS)
def test_a_file_with_any_head_gives_what_timm_gives_without_one(model: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = timm.create_model(model, pretrained=False)
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    teacher = load(f"timm:{model}", tmp_path / "w.pth")
    bare = timm.create_model(model, pretrained=False, num_classes=0).eval()
    bare.load_state_dict({key: value for key, value in whole.state_dict().items() if key in bare.state_dict()})
    images = torch.randn(1, 3, *teacher.spec.geometry.input_hw)
    with torch.inference_mode():
        out = teacher(images)
        torch.testing.assert_close(out.summary, bare.forward_head(bare.forward_features(images), pre_logits=True))
    assert torch.isfinite(out.spatial).all()
    assert (teacher.notes, teacher.spec.loaded) == ((), {})


@pytest.mark.parametrize(
    ("key", "whose"),
    [
        ("embeddings.cls_register_token", "C-RADIO in the names inside transformers"),
        ("encoder.layer.0.layer_scale1.lambda1", "DINOv2 in the format of transformers"),
        ("layer.0.layer_scale1.lambda1", "DINOv3 in the format of transformers"),
        ("encoder.layers.0.self_attn.q_proj.weight", "CLIP or SigLIP in the format of transformers"),
        ("dinov2.encoder.layer.0.layer_scale1.lambda1", "DINOv2 in the format of transformers"),
        ("vision_encoder.layers.0.attn.qkv.weight", "SAM in the format of transformers"),
        ("stages.0.downsample_layers.0.weight", "a ConvNeXt in the format of transformers"),
        ("embedder.embedder.convolution.weight", "a ResNet in the format of transformers"),
    ],
)
def test_the_names_that_transformers_writes_are_known(key: str, whose: str, tmp_path: Path) -> None:
    torch.save({key: torch.ones(1), "embeddings.mask_token": torch.ones(1)}, tmp_path / "w.pth")
    for name in ("dinov2-vit-s-14", "sam-vit-b", "openclip-vit-h-14", "timm:resnet18", "efficientnet-lite0"):
        with pytest.raises(TeacherWeightsError, match=f"It looks like {whose}"):
            load(name, tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "vit.npz", "clip.onnx"])
def test_a_file_that_is_no_state_dict_is_not_called_half_a_download(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"weight_map": {}}')
    with pytest.raises(
        TeacherWeightsError, match=r"weights are read from one file of PyTorch or safetensors"
    ) as caught:
        load("timm:resnet18", tmp_path / name)
    assert "fetch it again" not in str(caught.value)


def test_positions_of_an_image_tower_of_timm_are_recorded_where_they_are_resized(stand_in: StandIn) -> None:
    assert stand_in("siglip2-g-384")[0].spec.loaded == {}
    assert "pos_embed" in stand_in("siglip2-g-384", size_px=256)[0].spec.loaded["positions"]


MANY = (
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "coat_tiny",
    "convit_tiny",
    "convmixer_768_32",
    "cspresnet50",
    "davit_tiny",
    "deit3_small_patch16_224",
    "densenet121",
    "dpn48b",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "efficientvit_b0",
    "eva02_tiny_patch14_224",
    "fasternet_t0",
    "fastvit_mci0",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "ghostnet_050",
    "hgnetv2_b0",
    "hrnet_w18_small",
    "inception_next_atto",
    "lcnet_050",
    "mambaout_femto",
    "mixer_s32_224",
    "mixnet_s",
    "mobilenetv4_conv_small_035",
    "mobileone_s0",
    "mobilevit_xxs",
    "nest_tiny_jx",
    "nextvit_small",
    "pit_ti_224",
    "poolformer_s12",
    "rdnet_tiny",
    "regnetx_002",
    "repghostnet_050",
    "repvgg_a0",
    "resmlp_12_224",
    "resnetv2_18",
    "rexnet_100",
)
"""Of many of timm's files, each small."""


@pytest.mark.slow
@pytest.mark.parametrize("model", MANY)
def test_every_kind_of_timms_networks_takes_its_own_file_whole(model: str, tmp_path: Path) -> None:
    whole = timm.create_model(model)
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    teacher = load(f"timm:{model}", tmp_path / "w.pth")
    assert (teacher.notes, teacher.spec.loaded) == ((), {})
    own = teacher._net.state_dict()
    assert all(torch.equal(own[key], value) for key, value in whole.state_dict().items() if key in own)
