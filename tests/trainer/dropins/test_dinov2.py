"""DINOv2's outputs: the same as those of timm's DINOv2 where the student is it, and their shapes where it is not."""

import pytest
import timm
import torch
from torch import nn

from radio_cache.errors import ConfigError
from trainer.dropins import DinoV2Backbone
from trainer.dropins.dinov2 import IMAGENET_MEAN, IMAGENET_STD

IMAGES = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def test_with_dinov2_itself_as_the_student_tokens_are_the_same(as_student) -> None:
    torch.manual_seed(0)
    dinov2 = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, depth=2, num_classes=0).eval()

    def call(net: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = net.forward_features(x)
        return tokens[:, 0], tokens[:, net.num_prefix_tokens :].transpose(1, 2).unflatten(2, (4, 4))

    backbone = DinoV2Backbone(
        as_student("dino", (dinov2, IMAGENET_MEAN, IMAGENET_STD, call), image_hw=(56, 56)), "dino"
    )
    with torch.no_grad():
        expected, found = dinov2.forward_features(IMAGES), backbone.forward_features(IMAGES)
        torch.testing.assert_close(found["x_norm_clstoken"], expected[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["x_norm_patchtokens"], expected[:, 5:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(backbone(IMAGES), dinov2(IMAGES), rtol=1e-4, atol=1e-4)
        ((map_, token),) = backbone.get_intermediate_layers(IMAGES, reshape=True, return_class_token=True)
        (theirs,) = dinov2.get_intermediate_layers(IMAGES, n=1, reshape=True, norm=True)
        torch.testing.assert_close(map_, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(token, expected[:, 0], rtol=1e-4, atol=1e-4)
    assert backbone.patch_size == 14
    assert backbone.embed_dim == 384


@pytest.mark.parametrize(("teacher", "tokens", "width", "patch"), [("dino", 64, 32, 8), ("backbone", 16, 64, 16)])
def test_a_student_has_dinov2s_keys_and_takes_dinov2s_sizes(small_student, teacher, tokens, width, patch) -> None:
    backbone = DinoV2Backbone(small_student, teacher)
    with torch.no_grad():
        out = backbone.forward_features(IMAGES)  # 56 px: the student takes multiples of 32, and is shown 64
    assert out["x_norm_patchtokens"].shape == (2, tokens, width)
    assert out["x_norm_clstoken"].shape == (2, width)
    assert out["x_norm_regtokens"].shape == (2, 0, width)
    assert (backbone.patch_size, backbone.embed_dim) == (patch, width)


def test_what_a_student_cannot_stand_for_is_refused(small_student) -> None:
    with pytest.raises(ConfigError, match="'sam' gives no summary, which DINOv2's class token stands for"):
        DinoV2Backbone(small_student, "sam")
    backbone = DinoV2Backbone(small_student, "dino")
    with pytest.raises(ConfigError, match="takes no masks"):
        backbone.forward_features(IMAGES, masks=torch.zeros(2, 16))
    with pytest.raises(ConfigError, match="not for n=4"):
        backbone.get_intermediate_layers(IMAGES, n=4)
