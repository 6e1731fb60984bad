"""E-RADIO: published sizes, windows, position bias, folding."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainer.students import ERadio, create_student
from trainer.students.eradio import PositionBias, SumNeck, cut_windows, even_window, join_windows


# The papers count a 1000-class head and cut the digits after the comma (113.7 M is called 113 M).
@pytest.mark.parametrize(
    ("name", "published_millions"),
    [("e-radio-b", 118), ("e-radio-b-no-upsample", 113), ("e-radio-l", 265), ("e-radio-l-512", 391)],
)
def test_parameter_count_is_the_published_one(name: str, published_millions: int) -> None:
    with torch.device("meta"):
        student = create_student(name)
        head = nn.Linear(student.summary_dim, 1000)
    parameters = sum(p.numel() for module in (student, head) for p in module.parameters())
    assert int(parameters / 1e6) == published_millions


@pytest.mark.parametrize(
    ("name", "image_hw", "width", "map_hw"),
    [
        ("e-radio-b", (224, 224), 1024, (14, 14)),
        ("e-radio-b", (256, 320), 1024, (16, 20)),
        ("e-radio-b-no-upsample", (224, 224), 1024, (7, 7)),
        ("e-radio-l", (224, 224), 1536, (14, 14)),
        ("e-radio-l-512", (512, 512), 1536, (32, 32)),
    ],
)
def test_published_shapes(name: str, image_hw: tuple[int, int], width: int, map_hw: tuple[int, int]) -> None:
    with torch.device("meta"):
        student = create_student(name).eval()
        out = student(torch.empty(1, 3, *image_hw), feature_fmt="NCHW")
    assert out.summary.shape == (1, width)
    assert out.spatial.shape == (1, width, *map_hw)


@pytest.mark.parametrize(
    ("tokens", "window", "expected"), [(14, 7, 7), (7, 7, 7), (16, 7, 6), (8, 7, 4), (3, 8, 3), (1, 7, 1), (32, 16, 16)]
)
def test_windows_are_evened_out_and_never_larger_than_the_map(tokens: int, window: int, expected: int) -> None:
    assert even_window(tokens, window) == expected


@given(h=st.integers(1, 12), w=st.integers(1, 12), wh=st.integers(1, 5), ww=st.integers(1, 5))
def test_cutting_and_joining_windows_gives_the_map_back(h: int, w: int, wh: int, ww: int) -> None:
    x = torch.arange(2 * 3 * h * w).float().view(2, 3, h, w)
    assert torch.equal(join_windows(cut_windows(x, (wh, ww)), (h, w), (wh, ww)), x)


def test_a_window_holds_neighbours_row_major() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert cut_windows(x, (2, 2))[1].flatten().tolist() == [2, 3, 6, 7]


def test_position_bias_depends_only_on_the_offset_and_lies_in_0_to_16() -> None:
    bias = PositionBias(window=4, heads=2, hidden=8)((4, 4)).detach().view(2, 4, 4, 4, 4)
    assert bias.min() > 0
    assert bias.max() < 16
    # From (0, 0) to (1, 2) is the same way as from (2, 1) to (3, 3), and another than back.
    torch.testing.assert_close(bias[:, 0, 0, 1, 2], bias[:, 2, 1, 3, 3])
    assert not torch.allclose(bias[:, 0, 0, 1, 2], bias[:, 1, 2, 0, 0])


def test_a_smaller_window_reads_the_same_bias_for_the_same_offset() -> None:
    position_bias = PositionBias(window=4, heads=2, hidden=8)
    whole = position_bias((4, 4)).view(2, 4, 4, 4, 4)
    part = position_bias((2, 3)).view(2, 2, 3, 2, 3)
    torch.testing.assert_close(part, whole[:, :2, :3, :2, :3])


def test_longest_offset_is_scaled_to_log2_of_nine_over_three() -> None:
    offsets = PositionBias(window=5, heads=1, hidden=8).offsets
    assert offsets.max().item() == pytest.approx(3.169925 / 3)
    assert offsets.min().item() == pytest.approx(-3.169925 / 3)


@pytest.mark.parametrize("options", [{}, {"neck": "shuffle"}, {"neck": "none"}, {"local_conv": True}])
def test_deploy_gives_the_same_features_without_batch_norms(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    student = create_student("e-radio-tiny", **options)
    assert isinstance(student, ERadio)
    for _ in range(3):  # statistics and scales that a wrong fold would show
        student(torch.rand(8, 3, 64, 64))
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    student.eval()
    deployed = student.deploy()
    images = torch.rand(2, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(deployed(images), student(images), rtol=1e-4, atol=1e-5)
    left = [type(m).__name__ for m in deployed.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(left) == (1 if options.get("neck") == "none" else 0)
    assert not any(parameter.requires_grad for parameter in deployed.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_drop_path_rises_from_none_to_the_configured_rate() -> None:
    with torch.device("meta"):
        student = create_student("e-radio-b")
    rates = [module.drop_prob for module in student.modules() if type(module).__name__ == "DropPath"]
    # 15 attention blocks, the first without.
    assert len(rates) == 14
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.2)


@pytest.mark.parametrize(("name", "biases"), [("e-radio-b", 5_120), ("e-radio-l", 7_680)])
def test_the_declared_differences_from_the_first_paper_are_what_the_code_does(name: str, biases: int) -> None:
    with torch.device("meta"):
        student = create_student(name)
    assert isinstance(student, ERadio)
    assert isinstance(student.neck, SumNeck)
    convolutions = [level.conv for level in (student.neck.level16, student.neck.level32)]
    assert sum(one.out_channels for one in convolutions) == biases
    assert all(one.bias is None for one in convolutions)
    assert student.config.windows == (7, 7)
    text = (Path(__file__).parents[3] / "docs/students.md").read_text()
    assert f"{biases:,}" in text
