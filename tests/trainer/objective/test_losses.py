"""Losses: values worked out by hand, masks, and shapes that do not agree."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from radio_cache.errors import ShapeError
from trainer.objective.losses import (
    SPATIAL_LOSSES,
    SUMMARY_LOSSES,
    align_shifted,
    angular_dispersion,
    resize_tokens,
    spatial_match,
    spatial_mse,
    summary_angle,
    summary_cosine,
)


def all_valid(tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape[:2], dtype=torch.bool)


def test_summary_cosine_of_same_perpendicular_and_opposite_directions_is_0_1_and_2() -> None:
    student = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 1.0]])
    teacher = torch.tensor([[6.0, 8.0], [0.0, 5.0], [-2.0, -2.0]])
    assert summary_cosine(student, teacher).tolist() == pytest.approx([0, 1, 2], abs=1e-6)


def test_summary_cosine_of_45_degrees() -> None:
    distance = summary_cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    assert distance.item() == pytest.approx(1 - 1 / math.sqrt(2))


def test_spatial_match_of_two_tokens_worked_out_by_hand() -> None:
    student = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])
    teacher = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    # Token 0: cosine distance 1, smooth-L1 (0.5 + 0.5) / 2 = 0.5. Token 1: 0, and (|2| - 0.5 + 0) / 2 = 0.75.
    expected = ((0.9 * 1 + 0.1 * 0.5) + (0.9 * 0 + 0.1 * 0.75)) / 2
    loss = spatial_match(student, teacher, all_valid(student), cos_weight=0.9, l1_weight=0.1)
    assert loss.tolist() == pytest.approx([expected])


def test_smooth_l1_bends_at_a_difference_of_one() -> None:
    teacher = torch.zeros(1, 3, 1)
    student = torch.tensor([[[0.5], [1.0], [2.0]]])
    loss = spatial_match(student, teacher, all_valid(student), cos_weight=0, l1_weight=1)
    assert loss.item() == pytest.approx((0.125 + 0.5 + 1.5) / 3)


def test_spatial_mse_worked_out_by_hand() -> None:
    student = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])
    teacher = torch.tensor([[[0.0, 0.0]], [[3.0, 0.0]]])
    assert spatial_mse(student, teacher, all_valid(student)).tolist() == pytest.approx([2.5, 4.5])


@given(valid_tokens=st.integers(1, 5), seed=st.integers(0, 1000))
def test_padded_tokens_change_neither_loss_nor_gradient(valid_tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(2, 5, 4, generator=generator, requires_grad=True)
    teacher = torch.randn(2, 5, 4, generator=generator)
    valid = (torch.arange(5) < valid_tokens).expand(2, 5)
    for masked, cut in (
        (
            spatial_match(student, teacher, valid, cos_weight=0.9, l1_weight=0.1),
            spatial_match(
                student[:, :valid_tokens],
                teacher[:, :valid_tokens],
                valid[:, :valid_tokens],
                cos_weight=0.9,
                l1_weight=0.1,
            ),
        ),
        (
            spatial_mse(student, teacher, valid),
            spatial_mse(student[:, :valid_tokens], teacher[:, :valid_tokens], valid[:, :valid_tokens]),
        ),
    ):
        torch.testing.assert_close(masked, cut)
        (gradient,) = torch.autograd.grad(masked.sum(), student)
        assert gradient[:, valid_tokens:].abs().sum() == 0


def test_images_with_different_numbers_of_valid_tokens_weigh_the_same_each() -> None:
    student, teacher = torch.zeros(2, 4, 3), torch.ones(2, 4, 3)
    valid = torch.tensor([[True, False, False, False], [True, True, True, True]])
    assert spatial_mse(student, teacher, valid).tolist() == [1, 1]


def test_half_precision_inputs_give_float32_losses() -> None:
    student, teacher = torch.randn(2, 4, 8).bfloat16(), torch.randn(2, 4, 8).half()
    valid = all_valid(student)
    assert spatial_match(student, teacher, valid, cos_weight=0.9, l1_weight=0.1).dtype == torch.float32
    assert spatial_mse(student, teacher, valid).dtype == torch.float32
    assert summary_cosine(student[:, 0], teacher[:, 0]).dtype == torch.float32


def test_a_zero_vector_gives_a_finite_gradient() -> None:
    student = torch.zeros(1, 2, 3, requires_grad=True)
    spatial_match(student, torch.ones(1, 2, 3), all_valid(student), cos_weight=1, l1_weight=0).sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("student_shape", "teacher_shape", "valid_shape"),
    [
        ((2, 4, 8), (2, 5, 8), (2, 4)),
        ((2, 4, 8), (2, 4, 7), (2, 4)),
        ((2, 4, 8), (2, 4, 8), (2, 5)),
        ((2, 4), (2, 4), (2, 4)),
    ],
)
def test_spatial_shape_error_shows_both_shapes(
    student_shape: tuple[int, ...], teacher_shape: tuple[int, ...], valid_shape: tuple[int, ...]
) -> None:
    student, teacher, valid = torch.zeros(student_shape), torch.zeros(teacher_shape), torch.ones(valid_shape).bool()
    with pytest.raises(ShapeError) as mse_error:
        spatial_mse(student, teacher, valid)
    with pytest.raises(ShapeError) as match_error:
        spatial_match(student, teacher, valid, cos_weight=0.9, l1_weight=0.1)
    for message in (str(mse_error.value), str(match_error.value)):
        assert str(student_shape) in message
        assert str(teacher_shape) in message
        assert str(valid_shape) in message


def test_summary_shape_error_shows_both_shapes() -> None:
    with pytest.raises(ShapeError, match=r"student \(2, 8\), teacher \(2, 9\)"):
        summary_cosine(torch.zeros(2, 8), torch.zeros(2, 9))


@pytest.mark.parametrize(
    ("name", "expected"), [("cosine", 1 - 3 / 5), ("l1", 2.25), ("mse", 8.125), ("smooth-l1", (0.125 + 3.5) / 2)]
)
def test_every_distance_of_3_4_from_2_5_and_0(name: str, expected: float) -> None:
    """Differences of 0.5 and 4; for the cosine (3, 4) against (5, 0)."""
    student = torch.tensor([[3.0, 4.0]])
    teacher = torch.tensor([[5.0, 0.0]]) if name == "cosine" else torch.tensor([[2.5, 0.0]])
    assert SUMMARY_LOSSES[name](student, teacher).tolist() == pytest.approx([expected])
    # As maps: this token, one that is perfect, and one of padding that is far off.
    far = torch.tensor([[100.0, -100.0]])
    students, teachers = torch.stack([student, student, -far], dim=1), torch.stack([teacher, student, far], dim=1)
    valid = torch.tensor([[True, True, False]])
    assert SPATIAL_LOSSES[name](students, teachers, valid).tolist() == pytest.approx([expected / 2], abs=1e-6)


@pytest.mark.parametrize("name", SPATIAL_LOSSES)
def test_every_spatial_loss_refuses_shapes_that_differ(name: str) -> None:
    with pytest.raises(ShapeError, match=r"student \(1, 4, 2\), teacher \(1, 5, 2\)"):
        SPATIAL_LOSSES[name](torch.zeros(1, 4, 2), torch.zeros(1, 5, 2), torch.ones(1, 4).bool())


@pytest.mark.parametrize("name", SUMMARY_LOSSES)
def test_every_summary_loss_refuses_shapes_that_differ(name: str) -> None:
    with pytest.raises(ShapeError, match=r"student \(1, 4\), teacher \(1, 5\)"):
        SUMMARY_LOSSES[name](torch.zeros(1, 4), torch.zeros(1, 5))


def test_the_angle_loss_of_a_right_an_opposite_and_a_tiny_angle() -> None:
    student = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 1e-3]], requires_grad=True)
    teacher = torch.tensor([[0.0, 3.0], [-1.0, 0.0], [1.0, 0.0]])
    loss = summary_angle(student, teacher, dispersion=2.0)
    assert loss.tolist() == pytest.approx([(math.pi / 2) ** 2 / 2, math.pi**2 / 2, 1e-6 / 2], rel=1e-3)
    loss.sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_the_angle_loss_of_the_very_same_direction_has_a_finite_gradient() -> None:
    student = torch.tensor([[1.0, 0.0]], requires_grad=True)
    summary_angle(student, torch.tensor([[2.0, 0.0]]), dispersion=1.0).sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_dispersion_is_the_mean_squared_angle_from_the_mean_direction() -> None:
    # Mean direction (1, 0), both 60 degrees from it, lengths do not matter.
    summaries = torch.tensor([[0.5, math.sqrt(3) / 2], [1.0, -math.sqrt(3)]])
    assert angular_dispersion(summaries) == pytest.approx((math.pi / 3) ** 2)
    assert angular_dispersion(torch.ones(3, 4)) == 1e-4
    generator = torch.Generator().manual_seed(0)
    assert angular_dispersion(torch.randn(20000, 256, generator=generator)) == pytest.approx(
        (math.pi / 2) ** 2, rel=0.01
    )


def test_a_shifted_student_is_compared_where_both_crops_see() -> None:
    """A teacher's 3 x 3 map of numbers; the student saw a crop one row further down and says the very numbers there."""
    wide = torch.arange(16.0).reshape(4, 4)
    teacher = wide[:3, :3].reshape(1, 9, 1)
    student = wide[1:, :3].reshape(1, 9, 1)
    aligned, overlap = align_shifted(student, torch.tensor([[1, 0]]), (3, 3))
    assert overlap.tolist() == [[False] * 3 + [True] * 6]
    assert spatial_mse(aligned, teacher, overlap).item() == 0
    wrong, _ = align_shifted(student, torch.tensor([[0, 1]]), (3, 3))
    assert spatial_mse(wrong, teacher, overlap).item() > 1
    back, overlap = align_shifted(student, torch.tensor([[0, -2]]), (3, 3))
    assert overlap.reshape(3, 3).tolist() == [[True, False, False]] * 3
    assert back.reshape(3, 3)[:, 0].tolist() == student.reshape(3, 3)[:, 2].tolist()


def test_a_map_is_resized_bilinearly_with_half_pixel_centres() -> None:
    ramp = torch.tensor([0.0, 1.0]).reshape(1, 2, 1)
    assert resize_tokens(ramp, (1, 2), (1, 4)).flatten().tolist() == [0, 0.25, 0.75, 1]
    assert resize_tokens(ramp, (1, 2), (1, 2)) is ramp
    tall = resize_tokens(torch.arange(6.0).reshape(1, 6, 1), (3, 2), (6, 4)).reshape(6, 4)
    assert (tall[:, 1:] >= tall[:, :-1]).all()
    assert tall[-1, 0] > tall[0, -1]
