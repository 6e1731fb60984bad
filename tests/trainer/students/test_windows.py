"""Windowed attention of the ViT students: which blocks, which order, which window."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from radio_cache.errors import ConfigError
from trainer.students import UnsupportedResolutionError, ViT, create_student
from trainer.students.windows import draw_window, global_blocks, to_row_order, to_window_order


def vit(**overrides: object) -> ViT:
    torch.manual_seed(0)
    settings = {
        "width": 24,
        "depth": 4,
        "heads": 2,
        "registers": 2,
        "max_resolution": 256,
        "num_global": 2,
        **overrides,
    }
    student = create_student("vit-tiny-16", **settings)
    assert isinstance(student, ViT)
    return student


@pytest.mark.parametrize(
    ("depth", "num_global", "num_windowed", "expected"),
    [
        (12, 4, None, {2, 5, 8, 11}),
        (24, 4, None, {5, 11, 17, 23}),
        (32, 4, None, {7, 15, 23, 31}),
        (27, 4, None, {5, 11, 17, 23, 26}),
        (32, 4, 5, {5, 11, 17, 23, 29, 31}),
        (40, 8, None, {4, 9, 14, 19, 24, 29, 34, 39}),
        (3, 4, None, {0, 1, 2}),
    ],
)
def test_global_blocks_are_the_published_ones(
    depth: int, num_global: int, num_windowed: int | None, expected: set[int]
) -> None:
    assert global_blocks(depth, num_global=num_global, num_windowed=num_windowed) == expected


@given(rows=st.integers(1, 4), columns=st.integers(1, 4), window=st.integers(1, 4))
def test_window_order_is_undone_by_row_order(rows: int, columns: int, window: int) -> None:
    grid_hw = rows * window, columns * window
    tokens = torch.arange(2 * grid_hw[0] * grid_hw[1] * 3).float().view(2, -1, 3)
    assert torch.equal(to_row_order(to_window_order(tokens, grid_hw, window), grid_hw, window), tokens)


def test_a_window_is_row_major_inside() -> None:
    tokens = torch.arange(24.0).view(1, 24, 1)
    assert to_window_order(tokens, (4, 6), 2)[0, 4:8, 0].tolist() == [2, 3, 8, 9]


def test_nothing_crosses_a_window_before_the_first_global_block() -> None:
    student = vit(window=2).eval()
    assert student.min_resolution_step == 32
    images = torch.rand(1, 3, 64, 96)
    changed = images.clone()
    changed[..., :32, :32] = 1 - changed[..., :32, :32]  # the first window
    with torch.no_grad():
        windowed, joined = student.intermediates(images, [0, 1], feature_fmt="NCHW")
        other, other_joined = student.intermediates(changed, [0, 1], feature_fmt="NCHW")
    moved = (windowed.spatial - other.spatial).abs().amax(1)[0] > 0
    assert moved[:2, :2].all()
    assert moved.sum() == 4
    assert torch.equal(windowed.summary, other.summary)  # class tokens sit windowed blocks out
    assert ((joined.spatial - other_joined.spatial).abs().amax(1)[0] > 0).all()
    assert not torch.equal(joined.summary, other_joined.summary)


def test_a_windowed_block_is_the_block_on_each_window_alone() -> None:
    student = vit(window=2, position_drop=0.0).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        behind = student.intermediates(images, [0], feature_fmt="NCHW")[0].spatial
        plain = vit(position_drop=0.0).eval()
        plain.load_state_dict(student.state_dict())
        seen: list[torch.Tensor] = []
        plain.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        plain(images)
        patches = seen[0][:, 3:].view(4, 4, 24)  # one class token, two registers
        corner = student.blocks[0](patches[2:, :2].reshape(1, 4, 24))
    torch.testing.assert_close(behind[0, :, 2:, :2].flatten(1).T, corner[0])


def test_size_that_windows_do_not_divide_names_the_nearest_that_they_do() -> None:
    student = vit(window=3).eval()
    assert student.preferred_resolution == (96, 96)
    with pytest.raises(UnsupportedResolutionError, match=r"multiples of 48 pixels .* got 64 x 96: resize to 48 x 96"):
        student(torch.rand(1, 3, 64, 96))


def test_windows_are_drawn_from_those_that_divide_the_grid_as_often_as_asked() -> None:
    draws = [draw_window((2, 3, 4, 5), (12, 12), 0.75, number) for number in range(2000)]
    assert set(draws) == {2, 3, 4, None}
    assert draws.count(None) / 2000 == pytest.approx(0.25, abs=0.03)
    assert draws.count(3) / 2000 == pytest.approx(0.25, abs=0.03)
    assert draw_window((5, 7), (12, 12), 1.0, 0) is None


def test_training_draws_windows_and_a_resumed_student_draws_on_where_it_stopped() -> None:
    student = vit(train_windows=[2, 4], window_probability=0.5).train()
    drawn = [student._window((4, 4)) for _ in range(20)]
    assert set(drawn) == {2, 4, None}
    fresh, resumed = (vit(train_windows=[2, 4], window_probability=0.5).train() for _ in range(2))
    for _ in range(5):
        fresh(torch.rand(1, 3, 64, 64))
    resumed.load_state_dict(fresh.state_dict())
    assert [resumed._window((4, 4)) for _ in range(15)] == drawn[5:]
    assert student.eval()._window((4, 4)) is None


def test_gradients_reach_everything_in_a_windowed_step() -> None:
    student = vit(train_windows=[2], window_probability=1.0).train()
    out = student(torch.rand(2, 3, 64, 32))
    (out.summary.square().mean() + out.spatial.square().mean()).backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == []


def test_contradicting_window_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train_windows and window_probability go together, got \[4\] and 0.0"):
        vit(train_windows=[4])
    with pytest.raises(ConfigError, match="windows are at least 1 token wide, got window=0"):
        vit(window=0)
    with pytest.raises(ConfigError, match="window_probability is in"):
        vit(train_windows=[4], window_probability=2.0)
