"""Balancing: what each makes of losses worked out by hand, and that its state is whole."""

import math

import pytest
import torch
from torch import Tensor

from trainer.objective.balancing import BALANCINGS, AdaLoss, AmtmlKd, Naive, Terms, Uncertainty


def terms_of(*losses: float, present: tuple[int, ...] | None = None, images: int = 2) -> Terms:
    means = torch.tensor(losses)
    return Terms(means, means[:, None].expand(-1, images), torch.ones(images, 4), present or tuple(range(len(losses))))


@pytest.mark.parametrize("name", BALANCINGS)
def test_state_survives_a_save_and_parameters_get_gradients(name: str) -> None:
    def stepped() -> tuple[torch.nn.Module, Tensor]:
        torch.manual_seed(0)
        balancing = BALANCINGS[name](3, 4)
        total = balancing(terms_of(1.0, 2.0, 3.0))
        return balancing, total

    balancing, total = stepped()
    assert total.shape == ()
    parameters = list(balancing.parameters())
    for gradient in torch.autograd.grad(total, parameters) if parameters else ():
        assert gradient.isfinite().all()
    other = BALANCINGS[name](3, 4)
    other.load_state_dict(balancing.state_dict())
    later = terms_of(4.0, 1.0, 2.0)
    assert torch.equal(balancing(later), other(later))


def test_naive_is_the_sum() -> None:
    assert Naive()(terms_of(1.0, 2.0, 0.5)).item() == 3.5


def test_uncertainty_is_kendalls_and_rests_where_variances_are_the_losses() -> None:
    balancing = Uncertainty(2)
    assert balancing(terms_of(1.0, 4.0)).item() == pytest.approx(2.5)  # both sigmas are 1
    with torch.no_grad():
        balancing.log_variance.copy_(torch.tensor([1.0, 4.0]).log())
    total = balancing(terms_of(1.0, 4.0))
    assert total.item() == pytest.approx(0.5 + 0.5 + 0.5 * math.log(4))
    (gradient,) = torch.autograd.grad(total, [balancing.log_variance])
    assert gradient.tolist() == pytest.approx([0, 0], abs=1e-6)


def test_adaloss_divides_by_running_means_with_weights_of_one_on_average() -> None:
    balancing = AdaLoss(2)
    # Weights 1/1 and 1/4, scaled by 2 / 1.25: 1.6 and 0.4.
    assert balancing(terms_of(1.0, 4.0)).item() == pytest.approx(1.6 * 1 + 0.4 * 4)
    balancing(terms_of(2.0, 4.0))
    assert balancing.running.tolist() == pytest.approx([0.99 * 1 + 0.01 * 2, 4.0])


def test_adaloss_passes_no_gradient_through_its_weights() -> None:
    means = torch.tensor([1.0, 4.0], requires_grad=True)
    total = AdaLoss(2)(Terms(means, means[:, None].expand(-1, 2), torch.ones(2, 4), (0, 1)))
    (gradient,) = torch.autograd.grad(total, [means])
    assert gradient.tolist() == pytest.approx([1.6, 0.4])


def test_terms_that_are_absent_keep_their_state() -> None:
    balancing = AdaLoss(3)
    balancing(terms_of(1.0, 2.0, 3.0))
    balancing(terms_of(9.0, present=(1,)))
    assert balancing.running.tolist() == pytest.approx([1.0, 0.99 * 2 + 0.01 * 9, 3.0])
    uncertain = Uncertainty(3)
    (gradient,) = torch.autograd.grad(uncertain(terms_of(9.0, present=(1,))), [uncertain.log_variance])
    assert gradient.tolist() == pytest.approx([0, 0.5 - 4.5, 0])


def test_amtml_kd_starts_even_and_can_prefer_a_teacher_for_one_image() -> None:
    balancing = AmtmlKd(2, 2)
    losses = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    summary = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    terms = Terms(losses.mean(1), losses, summary, (0, 1))
    assert balancing(terms).item() == pytest.approx(4.0)
    with torch.no_grad():
        balancing.v.fill_(1.0)
        balancing.theta.copy_(torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]]))
    # Image 0: softmax(log 3, 0) = 3/4, 1/4, times two terms. Image 1: 1/2, 1/2.
    assert balancing.weights(summary, (0, 1)).T.tolist() == [pytest.approx([1.5, 0.5]), pytest.approx([1.0, 1.0])]
    assert balancing(terms).item() == pytest.approx(((1.5 * 1 + 0.5 * 3) + (1 + 3)) / 2)


def test_amtml_kd_gives_the_students_summary_no_gradient() -> None:
    summary = torch.ones(2, 4, requires_grad=True)
    total = AmtmlKd(2, 4)(terms_of(1.0, 2.0)._replace(summary=summary))
    assert torch.autograd.grad(total, [summary], allow_unused=True) == (None,)
