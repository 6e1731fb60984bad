"""Adaptor heads: widths, tokens, names, and what cannot be built."""

import pytest
import torch
from torch import nn

from radio_cache.errors import ConfigError
from trainer.model.adaptors import Adaptors, ResidualHead, TeacherWidths, spread_copies
from trainer.model.head_config import HeadConfig
from trainer.students import Student, StudentOutput, create_student

CLIP = TeacherWidths(name="clip-vit.l/14:336", summary_dim=48, spatial_dim=64)
SAM = TeacherWidths(name="sam-vith", summary_dim=None, spatial_dim=32)
DINO = TeacherWidths(name="dinov2.reg", summary_dim=40, spatial_dim=40)


def vit(class_tokens: int) -> Student:
    return create_student("vit-tiny-16", width=24, depth=1, heads=2, num_summary_tokens=class_tokens)


GRID = (3, 3)


def features_of(student: Student, images: int = 2, tokens: int = 9) -> StudentOutput:
    return StudentOutput(torch.randn(images, student.summary_dim), torch.randn(images, tokens, student.embed_dim))


def test_every_teacher_gets_its_own_widths_by_its_own_name() -> None:
    student = vit(1)
    guesses = Adaptors(student, [CLIP, SAM, DINO])(features_of(student), GRID)
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
    assert Adaptors(student, [CLIP, SAM], HeadConfig(width=96)).spatial_heads[1][0].out_features == 96  # type: ignore[index]


def test_each_summary_teacher_reads_only_its_own_class_token() -> None:
    student = vit(2)
    adaptors = Adaptors(student, [CLIP, SAM, DINO])
    summary = torch.randn(2, student.summary_dim, requires_grad=True)
    guesses = adaptors(StudentOutput(summary, torch.randn(2, 9, student.embed_dim)), GRID)
    for teacher, read, unread in ((CLIP, slice(0, 24), slice(24, 48)), (DINO, slice(24, 48), slice(0, 24))):
        (gradient,) = torch.autograd.grad(guesses[teacher.name].summary.square().sum(), summary)
        assert gradient[:, read].abs().sum() > 0
        assert gradient[:, unread].abs().sum() == 0


def test_one_summary_serves_every_teacher() -> None:
    student = vit(1)
    summary = torch.randn(2, student.summary_dim, requires_grad=True)
    guesses = Adaptors(student, [CLIP, DINO])(StudentOutput(summary, torch.randn(2, 9, student.embed_dim)), GRID)
    for teacher in (CLIP, DINO):
        (gradient,) = torch.autograd.grad(guesses[teacher.name].summary.square().sum(), summary)
        assert gradient.abs().sum() > 0


def test_outputs_are_float32_under_autocast() -> None:
    student = vit(1)
    adaptors = Adaptors(student, [CLIP])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        guess = adaptors(features_of(student), GRID)[CLIP.name]
    assert guess.summary.dtype == torch.float32
    assert guess.spatial.dtype == torch.float32


@pytest.mark.parametrize("config", [HeadConfig(), HeadConfig(kind="residual-mlp", blocks=2, upsample=2)])
def test_every_parameter_gets_a_gradient(config: HeadConfig) -> None:
    student = vit(2)
    adaptors = Adaptors(student, [CLIP, SAM, DINO], config)
    guesses = adaptors(student(torch.rand(2, 3, 32, 32)), (2, 2))
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


def test_a_residual_head_is_the_formula_of_the_papers() -> None:
    torch.manual_seed(0)
    head, x = ResidualHead(3, 8, 4, blocks=2), torch.randn(5, 3)
    hidden = x @ head.first.weight.T + head.first.bias
    for block in head.blocks:
        norm, _, linear = block
        hidden = hidden + linear(nn.functional.gelu(norm(hidden)))
    expected = head.last(nn.functional.gelu(head.end[0](hidden)))
    torch.testing.assert_close(head(x), expected)
    assert head.last.bias.abs().max() == 0


def test_upsampling_heads_give_finer_maps_row_major_and_summaries_as_before() -> None:
    student = vit(1)
    config = HeadConfig(kind="residual-mlp", blocks=1, upsample=3)
    guesses = Adaptors(student, [CLIP, SAM], config)(features_of(student, tokens=6), (2, 3))
    assert guesses[SAM.name].spatial.shape == (2, 9 * 6, SAM.spatial_dim)
    assert guesses[CLIP.name].summary is not None
    assert guesses[CLIP.name].summary.shape == (2, CLIP.summary_dim)


def test_copies_spread_as_a_pixel_shuffle_does() -> None:
    tokens = torch.randn(2, 6, 4 * 5)  # 2 x 3 tokens, 4 copies of 5 channels
    maps = tokens.unflatten(2, (4, 5)).transpose(2, 3).flatten(2).transpose(1, 2).unflatten(2, (2, 3))
    expected = nn.functional.pixel_shuffle(maps, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(spread_copies(tokens, (2, 3), 2), expected, rtol=0, atol=0)


def test_only_the_heads_asked_for_are_run_and_keep_their_tokens() -> None:
    student = vit(2)
    adaptors, features = Adaptors(student, [CLIP, SAM, DINO]), features_of(student)
    some, every = adaptors(features, GRID, [DINO.name]), adaptors(features, GRID)
    assert list(some) == [DINO.name]
    torch.testing.assert_close(some[DINO.name].summary, every[DINO.name].summary, rtol=0, atol=0)


def test_settings_of_heads_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'mlp' has no residual blocks .* choose adaptor=residual-mlp"):
        HeadConfig(blocks=1)
    with pytest.raises(ConfigError, match="adaptor_upsample at least 1, got 0 and 0"):
        HeadConfig(kind="residual-mlp", upsample=0)
    with pytest.raises(ConfigError, match=r"no adaptor is called 'mpl'. Did you mean 'mlp'"):
        HeadConfig(kind="mpl")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no teacher may be called 'backbone'"):
        Adaptors(vit(1), [TeacherWidths(name="backbone", summary_dim=None, spatial_dim=4)])
