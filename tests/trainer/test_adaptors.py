"""Adaptor heads: widths, tokens, names, and what cannot be built."""

import pytest
import torch

from radio_cache.errors import ConfigError
from trainer.adaptors import Adaptors, TeacherWidths
from trainer.students import Student, StudentOutput, create_student

CLIP = TeacherWidths(name="clip-vit.l/14:336", summary_dim=48, spatial_dim=64)
SAM = TeacherWidths(name="sam-vith", summary_dim=None, spatial_dim=32)
DINO = TeacherWidths(name="dinov2.reg", summary_dim=40, spatial_dim=40)


def vit(class_tokens: int) -> Student:
    return create_student("vit-tiny-16", width=24, depth=1, heads=2, num_summary_tokens=class_tokens)


def features_of(student: Student, images: int = 2, tokens: int = 9) -> StudentOutput:
    return StudentOutput(torch.randn(images, student.summary_dim), torch.randn(images, tokens, student.embed_dim))


def test_every_teacher_gets_its_own_widths_by_its_own_name() -> None:
    student = vit(1)
    guesses = Adaptors(student, [CLIP, SAM, DINO])(features_of(student))
    assert list(guesses) == [CLIP.name, SAM.name, DINO.name]
    for teacher in (CLIP, SAM, DINO):
        guess = guesses[teacher.name]
        assert guess.spatial.shape == (2, 9, teacher.spatial_dim)
        if teacher.summary_dim is None:
            assert guess.summary is None
        else:
            assert guess.summary is not None
            assert guess.summary.shape == (2, teacher.summary_dim)


def test_hidden_width_is_that_of_the_widest_teacher_unless_given() -> None:
    student = vit(1)
    assert Adaptors(student, [CLIP, SAM]).spatial_heads[1][0].out_features == 64  # type: ignore[index]
    assert Adaptors(student, [CLIP, SAM], hidden_dim=96).spatial_heads[1][0].out_features == 96  # type: ignore[index]


def test_each_summary_teacher_reads_only_its_own_class_token() -> None:
    student = vit(2)
    adaptors = Adaptors(student, [CLIP, SAM, DINO])
    summary = torch.randn(2, student.summary_dim, requires_grad=True)
    guesses = adaptors(StudentOutput(summary, torch.randn(2, 9, student.embed_dim)))
    for teacher, read, unread in ((CLIP, slice(0, 24), slice(24, 48)), (DINO, slice(24, 48), slice(0, 24))):
        (gradient,) = torch.autograd.grad(guesses[teacher.name].summary.square().sum(), summary)
        assert gradient[:, read].abs().sum() > 0
        assert gradient[:, unread].abs().sum() == 0


def test_one_summary_serves_every_teacher() -> None:
    student = vit(1)
    summary = torch.randn(2, student.summary_dim, requires_grad=True)
    guesses = Adaptors(student, [CLIP, DINO])(StudentOutput(summary, torch.randn(2, 9, student.embed_dim)))
    for teacher in (CLIP, DINO):
        (gradient,) = torch.autograd.grad(guesses[teacher.name].summary.square().sum(), summary)
        assert gradient.abs().sum() > 0


def test_outputs_are_float32_under_autocast() -> None:
    student = vit(1)
    adaptors = Adaptors(student, [CLIP])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        guess = adaptors(features_of(student))[CLIP.name]
    assert guess.summary.dtype == torch.float32
    assert guess.spatial.dtype == torch.float32


def test_every_parameter_gets_a_gradient() -> None:
    student = vit(2)
    adaptors = Adaptors(student, [CLIP, SAM, DINO])
    guesses = adaptors(student(torch.rand(2, 3, 32, 32)))
    loss = sum(
        g.spatial.square().mean() + (0 if g.summary is None else g.summary.square().mean()) for g in guesses.values()
    )
    loss.backward()
    without = [n for m in (student, adaptors) for n, p in m.named_parameters() if p.grad is None]
    assert without == []


def test_wrong_number_of_class_tokens_says_how_many_are_needed() -> None:
    with pytest.raises(ConfigError, match=r"has 3 class tokens for 2 teachers .*num_summary_tokens=2"):
        Adaptors(vit(3), [CLIP, SAM, DINO])


def test_same_name_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="different names"):
        Adaptors(vit(1), [CLIP, CLIP])


def test_no_teachers_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one teacher"):
        Adaptors(vit(1), [])
