"""Balancing of the losses of several teachers: a plain sum, or weights that are learnt or follow the losses.

A *term* is one loss of one teacher (of its summary or of its maps). A balancing takes the terms of a step, already multiplied by
their weights of the recipe, and returns the scalar to minimise. Learnt weights are in its `state_dict`, saved in every
checkpoint.

Compared by AM-RADIO (arXiv 2312.06709), ViT-B/14 from CLIP and DINOv2, zero-shot / k-NN / ADE20K: naive 70.63 / 79.50 / 44.71,
uncertainty 70.92 / 79.37 / 44.57, AdaLoss 71.31 / 79.77 / 44.36; AMTML-KD collapsed onto one teacher.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Terms(NamedTuple):
    """The losses of a step.

    Attributes:
        means: (t,) mean of each term over the images.
        per_image: (t, b) the contribution of each image. The mean over images is `means`, up to rounding.
        summary: (b, s) of the student.
        present: (t,) indices of these terms among the run's, for steps that train on some of the teachers only.
    """

    means: Float[Tensor, " t"]
    per_image: Float[Tensor, "t b"]
    summary: Float[Tensor, "b s"]
    present: tuple[int, ...]


class Balancing(nn.Module, ABC):
    """A rule that turns the terms of a step into one scalar."""

    @abstractmethod
    def forward(self, terms: Terms) -> Tensor:
        """Return the scalar to minimise, ()."""
        ...


@final
class Naive(Balancing):
    """The plain sum of the terms, as in AM-RADIO."""

    def forward(self, terms: Terms) -> Tensor:
        # One after another: the order of the additions is fixed, and so is their rounding.
        total = torch.zeros((), device=terms.means.device)
        for loss in terms.means.unbind():
            total = total + loss
        return total


@final
class Uncertainty(Balancing):
    """Homoscedastic uncertainty: the sum of L / (2 sigma^2) + log sigma, with a learnt sigma per term that starts at 1.

    At equilibrium sigma^2 equals the loss, so that every term contributes 1/2 whatever its scale. A loss of 0 would drive its
    sigma to 0, but losses of real students stay far from it.

    Source: Kendall, Gal, Cipolla, arXiv 1705.07115, Eq. 7, for regression.
    """

    def __init__(self, num_terms: int) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(num_terms))

    def forward(self, terms: Terms) -> Tensor:
        # exp(-log sigma^2) / 2 is 1 / (2 sigma^2), and log sigma^2 / 2 is log sigma. A learnt logarithm keeps sigma positive.
        # (t,) -> ()
        log_variance = self.log_variance[list(terms.present)]
        return (0.5 * torch.exp(-log_variance) * terms.means + 0.5 * log_variance).sum()


@final
class AdaLoss(Balancing):
    """Each term divided by its own running mean, so that all terms contribute equally. The weights of a step average 1.

    The running mean starts at the first loss, and no gradient passes through it.

    Source: Hu, Dey, Hebert, Bagnell, arXiv 1708.06832; momentum 0.99 as in AM-RADIO. Difference: weights are scaled to an
    average of 1, so that learning rate and gradient clipping keep their meaning.
    """

    def __init__(self, num_terms: int, momentum: float = 0.99) -> None:
        super().__init__()
        self._momentum = momentum
        self.running: Tensor
        self.register_buffer("running", torch.zeros(num_terms))

    def forward(self, terms: Terms) -> Tensor:
        losses, indices = terms.means, list(terms.present)
        with torch.no_grad():
            before = self.running[indices]
            updated = self._momentum * before + (1 - self._momentum) * losses
            # Zero marks a term without a loss so far, since running means of positive losses are positive.
            now = torch.where(before > 0, updated, losses).clamp(min=1e-12)
            self.running[indices] = now
            weights = 1 / now
            # (t,) weights that average 1
            weights = weights * (len(indices) / weights.sum())
        return (weights * losses).sum()


@final
class AmtmlKd(Balancing):
    """A weight per image and term: the softmax over terms of v . (theta_term * summary), times the number of terms.

    Theta and v are learnt with the student, whose summary gets no gradient from here. The weights are free to
    prefer the easiest teacher, and AM-RADIO observed a collapse onto one. It is included for comparison.

    Source: Liu, Zhang, Wang, Neurocomputing 415 (2020), Eq. 2-4. Difference: the student's summary replaces its pooled map.
    """

    def __init__(self, num_terms: int, summary_dim: int) -> None:
        super().__init__()
        # All rows alike, so that the softmax gives every term the same weight at the start.
        self.theta = nn.Parameter(torch.ones(num_terms, summary_dim))
        self.v = nn.Parameter(torch.full((summary_dim,), summary_dim**-0.5))

    def forward(self, terms: Terms) -> Tensor:
        # (t, b) * (t, b) -> (t,) -> ()
        return (self.weights(terms.summary, terms.present) * terms.per_image).mean(1).sum()

    def weights(self, summary: Float[Tensor, "b s"], present: tuple[int, ...]) -> Float[Tensor, "t b"]:
        """Return the weights. For every image they sum to the number of terms, and at the start all are 1."""
        # (t, 1, s) * (1, b, s) @ (s,) -> (t, b)
        theta = self.theta[list(present)]
        scores = (theta[:, None, :] * summary.detach().float()[None]) @ self.v
        return torch.softmax(scores, dim=0) * len(present)


BALANCINGS: Final[dict[str, Callable[[int, int], Balancing]]] = {
    "naive": lambda num_terms, summary_dim: Naive(),
    "uncertainty": lambda num_terms, summary_dim: Uncertainty(num_terms),
    "adaloss": lambda num_terms, summary_dim: AdaLoss(num_terms),
    "amtml-kd": AmtmlKd,
}
"""Name -> factory, called with the number of terms and the width of the student's summary."""
