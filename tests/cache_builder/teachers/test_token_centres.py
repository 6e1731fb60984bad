"""Where tokens lie: compared with what a token really looks at."""

import pytest
import timm
import torch
from torch import nn

from cache_builder.teachers.efficientnet_lite import same_padding_grid
from cache_builder.teachers.token_centres import TokenCentres, token_centres
from radio_cache.errors import ConfigError


def centres(net: nn.Module, size_px: int) -> TokenCentres:
    def run() -> int:
        return int(net.forward_intermediates(torch.zeros(1, 3, size_px, size_px), indices=1)[1][0].shape[-1])

    with torch.no_grad():
        return token_centres(net, run, subject="this network", size_px=size_px)


def meta(model: str, **arguments: object) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(model, pretrained=False, **arguments).eval()


@pytest.mark.parametrize(
    ("model", "size_px", "expected"),
    [
        ("vit_tiny_patch16_224", 224, (16, 8)),
        ("vit_small_patch14_dinov2", 518, (14, 7)),
        ("naflexvit_base_patch16_gap", 384, (16, 8)),
        ("convnext_atto", 224, (32, 16)),
        ("swin_tiny_patch4_window7_224", 224, (32, 16)),
        ("swinv2_tiny_window8_256", 256, (32, 16)),
        ("resnet50", 224, (32, 0.5)),
        ("densenet121", 224, (32, 14.5)),
        ("sam2_hiera_tiny", 224, (32, 14.5)),
    ],
)
def test_centres_of_well_known_networks(model: str, size_px: int, expected: tuple[float, float]) -> None:
    with torch.device("meta"):
        assert centres(meta(model), size_px) == expected


@pytest.mark.parametrize("size_px", [224, 240, 96, 130])
def test_same_padding_gives_what_is_known_of_efficientnet_lite(size_px: int) -> None:
    with torch.device("meta"):
        assert centres(meta("tf_efficientnet_lite0"), size_px) == (32, same_padding_grid(size_px, 5)[1])


@pytest.mark.parametrize(
    "model", ["resnet18", "regnety_002", "densenet121", "efficientnet_b0", "tf_efficientnet_lite0"]
)
@pytest.mark.parametrize("size_px", [96, 128])
def test_a_token_looks_at_its_centre(model: str, size_px: int) -> None:
    """With only the middle of every kernel left, and pools that average, the middle of what a token sees is its centre."""
    net = timm.create_model(model, pretrained=False).eval()
    for module in list(net.modules()):
        if isinstance(module, nn.Conv2d):
            h, w = module.kernel_size
            module.weight.data.zero_()
            module.weight.data[..., h // 2, w // 2] = 1 / module.weight.shape[1]
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        for name, child in module.named_children():
            if isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
            elif isinstance(child, nn.ReLU | nn.SiLU | nn.ReLU6) or name == "se":
                setattr(module, name, nn.Identity())
    stride, offset = centres(net, size_px)
    image = torch.zeros(1, 3, size_px, size_px, requires_grad=True)
    tokens = net.forward_intermediates(image, indices=1)[1][0]
    (gradient,) = torch.autograd.grad(tokens[0, :, 1, 1].sum(), image)
    profile = gradient[0].sum(dim=(0, 1)).double()
    position = torch.arange(size_px, dtype=torch.float64) + 0.5
    assert float((profile * position).sum() / profile.sum()) == pytest.approx(offset + stride, abs=1e-3)


def test_branches_that_look_at_different_places_are_refused() -> None:
    with (
        torch.device("meta"),
        pytest.raises(ConfigError, match="this network has branches with different centres"),
    ):
        centres(meta("resnet50d"), 224)


def test_layers_that_are_not_known_are_refused() -> None:
    with (
        torch.device("meta"),
        pytest.raises(ConfigError, match="gets from 56 to 7 tokens a side by layers of an unknown kind"),
    ):
        centres(meta("hiera_tiny_224"), 224)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 1, 3, stride=2, padding=1),
        nn.Conv2d(3, 1, 2, stride=2),
        nn.Conv2d(3, 1, 7, stride=4, padding=3),
        nn.Conv2d(3, 1, 3, stride=2, padding=2, dilation=2),
        nn.AvgPool2d(2),
        nn.Conv2d(3, 1, 5, stride=3),
    ],
)
def test_one_layer_is_centred_where_an_impulse_reaches_it_through_the_middle(layer: nn.Module) -> None:
    image = torch.zeros(1, 3, 64, 64, requires_grad=True)
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    stride, offset = token_centres(layer, lambda: int(layer(image).shape[-1]), subject="a layer", size_px=64)
    (gradient,) = torch.autograd.grad(layer(image)[0, 0, 5, 5], image)
    columns = gradient[0, 0].sum(dim=0).nonzero().flatten().double() + 0.5
    assert float(columns.mean()) == offset + 5 * stride
