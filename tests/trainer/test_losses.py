"""Losses: values worked out by hand, masks, and shapes that do not agree."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from radio_cache.errors import ShapeError
from trainer.losses import spatial_match, spatial_mse, summary_cosine


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
