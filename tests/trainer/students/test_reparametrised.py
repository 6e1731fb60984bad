"""Spectral reparametrisation and DAMP noise: what they do to weights, and that nothing of them is left at export."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from trainer.students import ViT, create_student
from trainer.students.reparametrised import ALPHA, SpectralScale


def vit(**overrides: object) -> ViT:
    torch.manual_seed(0)
    settings = {"width": 24, "depth": 2, "heads": 2, "registers": 2, "max_resolution": 128, **overrides}
    student = create_student("vit-tiny-16", **settings)
    assert isinstance(student, ViT)
    return student


def spectral_linear(rows: int, columns: int, chunks: int) -> nn.Linear:
    linear = nn.Linear(columns, rows)
    parametrize.register_parametrization(linear, "weight", SpectralScale(linear.weight, chunks=chunks))
    return linear


def test_the_weight_starts_as_it_was_and_the_seed_gives_the_same_student() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(24, 72)
    torch.manual_seed(0)
    reparametrised = spectral_linear(72, 24, 3).eval()
    torch.testing.assert_close(reparametrised.weight, plain.weight, rtol=1e-4, atol=1e-6)
    assert torch.equal(vit().tokens, vit(spectral_reparam=True).tokens)
    # PyTorch tries a parametrisation out when it is registered, which is one more step of power iteration.
    torch.testing.assert_close(
        vit(spectral_reparam=True).eval().blocks[1].mlp[0].weight, vit().blocks[1].mlp[0].weight, rtol=1e-3, atol=1e-6
    )


def test_each_chunk_has_the_spectral_norm_its_scale_asks_for() -> None:
    torch.manual_seed(0)
    linear = spectral_linear(48, 16, 3)
    scale = linear.parametrizations.weight[0].scale
    with torch.no_grad():
        scale.copy_(torch.tensor([-2.0, 0.5, 3.0]).view(3, 1, 1))
    linear.train()
    with torch.no_grad():
        for _ in range(200):  # power iteration settles
            weight = linear.weight
    norms = torch.linalg.matrix_norm(weight.view(3, 16, 16), 2)
    torch.testing.assert_close(norms, F.softplus(scale.detach()).flatten() + ALPHA, rtol=1e-3, atol=1e-4)


def test_power_iteration_runs_in_training_only_and_gradients_are_those_of_the_formula() -> None:
    torch.manual_seed(0)
    linear = spectral_linear(8, 6, 1).eval()
    part = linear.parametrizations.weight[0]
    before = part.right.clone()
    x = torch.randn(5, 6)
    linear(x).square().sum().backward()
    assert torch.equal(part.right, before)
    w = linear.parametrizations.weight.original.detach().clone().requires_grad_()
    s = part.scale.detach().clone().requires_grad_()
    sigma = part.left[0] @ w @ part.right[0]
    (x @ (w * (F.softplus(s[0]) + ALPHA) / (sigma + 1e-6)).T + linear.bias.detach()).square().sum().backward()
    torch.testing.assert_close(linear.parametrizations.weight.original.grad, w.grad)
    torch.testing.assert_close(part.scale.grad, s.grad)
    linear.train()
    linear(x)
    assert not torch.equal(part.right, before)


def test_a_large_weight_does_not_overflow() -> None:
    linear = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        linear.weight.copy_(1000 * torch.eye(4))
    parametrize.register_parametrization(linear, "weight", SpectralScale(linear.weight, chunks=1))
    torch.testing.assert_close(linear.weight, 1000 * torch.eye(4), rtol=1e-4, atol=1e-3)


def test_every_linear_of_the_blocks_and_no_other_is_reparametrised() -> None:
    student = vit(spectral_reparam=True, gated_mlp=True)
    linears = {name: m for name, m in student.named_modules() if isinstance(m, nn.Linear)}
    chunks = {
        name: linear.parametrizations.weight[0].chunks
        for name, linear in linears.items()
        if parametrize.is_parametrized(linear)
    }
    assert set(linears) - set(chunks) == {"embed"}
    assert chunks["blocks.0.qkv"] == 3
    assert chunks["blocks.1.mlp.0"] == 2
    assert chunks["blocks.1.mlp.2"] == chunks["blocks.0.proj"] == 1


def test_a_training_step_moves_the_scales() -> None:
    student = vit(spectral_reparam=True, damp_sigma=0.1).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    scale = student.blocks[0].qkv.parametrizations.weight[0].scale
    before = scale.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        student(torch.rand(2, 3, 32, 32)).spatial.square().mean().backward()
        optimizer.step()
    assert (scale != before).all()


def test_noise_is_multiplicative_of_the_given_size_and_only_in_training() -> None:
    student = vit(damp_sigma=0.25)
    linear = student.blocks[0].mlp[0]
    clean = linear.parametrizations.weight.original.detach()
    torch.manual_seed(1)
    ratio = (torch.stack([linear.weight.detach() for _ in range(20)]) / clean)[:, clean.abs() > 1e-4]
    assert ratio.mean().item() == pytest.approx(1, abs=0.01)
    assert ratio.std().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(student.eval().blocks[0].mlp[0].weight, clean)


def test_materialised_student_is_a_plain_one_with_the_same_features() -> None:
    student = vit(spectral_reparam=True, damp_sigma=0.1, train_windows=[2], window_probability=0.5).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        student(torch.rand(2, 3, 32, 32)).spatial.square().mean().backward()
        optimizer.step()
    student.eval()
    exported = student.materialised()
    plain = vit()
    plain.load_state_dict(exported.state_dict())
    images = torch.rand(2, 3, 48, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(images), student(images), rtol=1e-5, atol=1e-5)
    assert parametrize.is_parametrized(student.blocks[0].qkv)  # training can go on
    assert exported.config == plain.config
