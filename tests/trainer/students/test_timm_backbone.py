"""timm backbones as students: stages, sizes, and names timm does not have."""

import pytest
import torch

from radio_cache.errors import ConfigError
from trainer.students import UnsupportedResolutionError, create_student, timm_backbone

# Oblong, and small; no multiple of 32.
OTHER_SIZES = ((240, 336), (112, 80))


CUT = [name for name in timm_backbone.VERSIONS if not name.endswith("-whole")]


@pytest.mark.parametrize("name", CUT)
def test_backbones_of_the_paper_give_a_map_of_stride_16_at_224(name: str) -> None:
    with torch.device("meta"):
        student = create_student(name).eval()
    assert student.preferred_resolution == (224, 224)
    out = student(torch.empty(1, 3, 224, 224, device="meta"), feature_fmt="NCHW")
    assert student.patch_size == 16
    assert out.spatial.shape == (1, student.embed_dim, 14, 14)


@pytest.mark.parametrize("name", [name for name in CUT if name != "maxvit-b"])
@pytest.mark.parametrize("image_hw", OTHER_SIZES)
def test_backbones_of_the_paper_take_oblong_images(name: str, image_hw: tuple[int, int]) -> None:
    with torch.device("meta"):
        student = create_student(name).eval()
    out = student(torch.empty(1, 3, *image_hw, device="meta"), feature_fmt="NCHW")
    assert out.spatial.shape[2:] == (image_hw[0] // 16, image_hw[1] // 16)


# Millions in AM-RADIO's table of efficient students (arXiv 2312.06709).
TABLE = {
    "efficientnetv2-s": 21,
    "resnetv2-101": 44,
    "regnety-064": 30,
    "efficientvit-l1": 38,
    "convnext-b": 88,
    "nfnet-f3": 254,
    "swinv2-s": 49,
    "maxvit-b": 119,
    "poolformerv2-m36": 56,
    "mvitv2-b": 51,
}


@pytest.mark.parametrize("name", CUT)
def test_the_networks_of_the_table_are_there_whole_by_name(name: str) -> None:
    with torch.device("meta"):
        student = create_student(f"{name}-whole").eval()
    published = TABLE[name]
    assert student.name == f"{name}-whole"
    assert (student.patch_size, student.preferred_resolution) == (32, (224, 224))
    out = student(torch.empty(1, 3, 224, 224, device="meta"), feature_fmt="NCHW")
    assert out.spatial.shape == (1, student.embed_dim, 7, 7)
    millions = sum(p.numel() for p in student.parameters()) / 1e6
    with_head = millions + (student.embed_dim + 1) / 1e3
    # The table rounds down or to the nearest; what it counts beside the layers is not told, a head of 1,000 classes or none.
    assert millions - 1 < published < with_head + 1.6
    if name == "efficientvit-l1":
        assert millions == pytest.approx(38.04, abs=0.005)


def test_maxvit_takes_one_size_says_so_and_can_be_laid_out_for_another() -> None:
    with torch.device("meta"):
        student, oblong = create_student("maxvit-b").eval(), create_student("maxvit-b", img_size=(256, 320)).eval()
    with pytest.raises(UnsupportedResolutionError, match=r"'maxvit-b' takes exactly 224 x 224 pixels"):
        student(torch.empty(1, 3, 256, 320, device="meta"))
    out = oblong(torch.empty(1, 3, 256, 320, device="meta"), feature_fmt="NCHW")
    assert out.spatial.shape == (1, oblong.embed_dim, 16, 20)


def test_size_that_only_the_network_refuses_is_told_with_its_reason() -> None:
    with torch.device("meta"):
        student = create_student("timm:maxvit_base_tf_224", any_resolution=True).eval()
    with pytest.raises(UnsupportedResolutionError, match=r"cannot take 256 x 256 \(.*window.*224 x 224 works"):
        student(torch.empty(1, 3, 256, 256, device="meta"))


def test_fused_stages_stand_side_by_side_at_the_finest_of_them() -> None:
    torch.manual_seed(0)
    fused = create_student("timm:resnet10t", out_index=[4, 3]).eval()
    assert (fused.patch_size, fused.min_resolution_step, fused.embed_dim) == (16, 32, 256 + 512)
    fine, coarse = (create_student("timm:resnet10t", out_index=stage).eval() for stage in (3, 4))
    for part in (fine, coarse):
        part.load_state_dict({key: value for key, value in fused.state_dict().items() if key in part.state_dict()})
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        both, first, second = (s(images, feature_fmt="NCHW").spatial for s in (fused, fine, coarse))
    torch.testing.assert_close(both[:, :256], first)
    assert both.shape == (1, 768, 4, 6)
    torch.testing.assert_close(both[:, 256:].mean((2, 3)), second.mean((2, 3)), rtol=1e-3, atol=1e-3)


def test_summary_is_the_mean_of_the_map() -> None:
    student = create_student("timm:resnet10t").eval()
    with torch.no_grad():
        out = student(torch.rand(2, 3, 64, 64))
    torch.testing.assert_close(out.summary, out.spatial.mean(1))


def test_another_stage_can_be_asked_for() -> None:
    student = create_student("timm:resnet10t", out_index=4)
    assert (student.patch_size, student.embed_dim) == (32, 512)
    assert student(torch.rand(2, 3, 64, 96)).spatial.shape == (2, 2 * 3, 512)


def test_any_block_of_a_transformer_can_be_asked_for() -> None:
    with torch.device("meta"):
        shallow = create_student("timm:vit_tiny_patch16_224", out_index=2)
        deep = create_student("timm:vit_tiny_patch16_224")
    assert len(list(shallow.parameters())) < len(list(deep.parameters()))


def test_missing_stage_error_lists_the_stages() -> None:
    with pytest.raises(ConfigError, match=r"'resnet10t' has no stage 7. Stages: .*3 \(stride 16\), 4 \(stride 32\)"):
        create_student("timm:resnet10t", out_index=7)


def test_model_of_one_size_says_so() -> None:
    student = create_student("timm:vit_tiny_patch16_224", depth=1, out_index=0)
    with pytest.raises(UnsupportedResolutionError, match=r"takes exactly 224 x 224 pixels .* got 96 x 96"):
        student(torch.rand(1, 3, 96, 96))


@pytest.mark.parametrize("options", [{"img_size": 96}, {"img_size": (96, 96)}, {"dynamic_img_size": True}])
def test_options_reach_timm(options: dict[str, object]) -> None:
    student = create_student("timm:vit_tiny_patch16_224", depth=1, out_index=0, **options)
    assert student(torch.rand(1, 3, 96, 96)).spatial.shape == (1, 36, 192)


def test_unknown_model_error_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no model 'resnet51'. Nearest: .*resnet50"):
        create_student("timm:resnet51")
