"""timm backbones as students: stages, sizes, and names timm does not have."""

import pytest
import torch

from radio_cache.errors import ConfigError
from trainer.students import UnsupportedResolutionError, create_student

# AM-RADIO's table of efficient students.
PAPER_TABLE = (
    "tf_efficientnetv2_s", "resnetv2_101", "regnety_064", "efficientvit_l1", "convnext_base", "dm_nfnet_f3",
    "swinv2_small_window8_256", "maxvit_base_tf_224", "poolformerv2_m36", "mvitv2_base",
)  # fmt: skip


@pytest.mark.parametrize("model_name", PAPER_TABLE)
def test_backbones_of_the_paper_give_a_map_of_stride_16(model_name: str) -> None:
    with torch.device("meta"):
        student = create_student(f"timm:{model_name}").eval()
    h, w = student.preferred_resolution
    out = student(torch.empty(1, 3, h - h % 16, w - w % 16, device="meta"), feature_fmt="NCHW")
    assert student.patch_size == 16
    assert out.spatial.shape == (1, student.embed_dim, h // 16, w // 16)


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
