"""How the losses of several teachers become one: as they are, or with weights that are learnt or follow the losses.

A *term* is one loss of one teacher (its summary's or its maps'). Every balancing takes the terms of a step, each already
times its weight of the recipe, and gives the scalar to minimise. What it has learnt is its `state_dict`, saved in every
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
    """The losses of a step: one for each term, and the parts of it that come from each image.

    means (t,). per_image (t, b): their mean over images is `means`, up to rounding. summary (b, s): the student's.
    present: which of the run's terms these are, t numbers, for steps that ask only some of the teachers.
    """

    means: Float[Tensor, " t"]
    per_image: Float[Tensor, "t b"]
    summary: Float[Tensor, "b s"]
    present: tuple[int, ...]


class Balancing(nn.Module, ABC):
    """Terms to the scalar to minimise."""

    @abstractmethod
    def forward(self, terms: Terms) -> Tensor: ...


@final
class Naive(Balancing):
    """The sum: what AM-RADIO uses."""

    def forward(self, terms: Terms) -> Tensor:
        total = torch.zeros((), device=terms.means.device)
        for loss in terms.means.unbind():
            total = total + loss
        return total


@final
class Uncertainty(Balancing):
    """sum of L / (2 sigma^2) + log sigma, a learnt sigma for each term, starting at 1.

    At rest sigma^2 is the loss itself, so that every term weighs 1/2 whatever its scale. A term of 0 would send its
    sigma to 0; losses of real students do not come near.
    Source: Kendall, Gal, Cipolla, arXiv 1705.07115, Eq. 7, for regression.
    """

    def __init__(self, num_terms: int) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(num_terms))

    def forward(self, terms: Terms) -> Tensor:
        log_variance = self.log_variance[list(terms.present)]
        return (0.5 * torch.exp(-log_variance) * terms.means + 0.5 * log_variance).sum()


@final
class AdaLoss(Balancing):
    """Each term over its own running mean, so that all terms weigh alike; the weights of the terms present average 1.

    The running mean starts at the first loss seen, and no gradient passes through it.
    Source: Hu, Dey, Hebert, Bagnell, arXiv 1708.06832; momentum 0.99 as in AM-RADIO. Differs: weights are scaled to an
    average of 1, so that learning rate and clipping mean what they mean without it.
    """

    def __init__(self, num_terms: int, momentum: float = 0.99) -> None:
        super().__init__()
        self._momentum = momentum
        self.running: Tensor
        self.register_buffer("running", torch.zeros(num_terms))

    def forward(self, terms: Terms) -> Tensor:
        losses, places = terms.means, list(terms.present)
        with torch.no_grad():
            before = self.running[places]
            moved = self._momentum * before + (1 - self._momentum) * losses
            # Zero is "not seen yet": means of positive losses never are.
            now = torch.where(before > 0, moved, losses).clamp(min=1e-12)
            self.running[places] = now
            weights = 1 / now
            weights = weights * (len(places) / weights.sum())
        return (weights * losses).sum()


@final
class AmtmlKd(Balancing):
    """Weights of terms by image: the softmax over terms of v . (theta_term * summary), times the number of terms.

    Theta and v are learnt with the student, whose summary gets no gradient from here. As the weights are free to
    prefer what is easy, they do: AM-RADIO saw it collapse onto one teacher. It is here to be compared with.
    Source: Liu, Zhang, Wang, Neurocomputing 415 (2020), Eq. 2-4. Differs: the student's summary stands for its pooled map.
    """

    def __init__(self, num_terms: int, summary_dim: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(num_terms, summary_dim))
        self.v = nn.Parameter(torch.full((summary_dim,), summary_dim**-0.5))

    def forward(self, terms: Terms) -> Tensor:
        return (self.weights(terms.summary, terms.present) * terms.per_image).mean(1).sum()

    def weights(self, summary: Float[Tensor, "b s"], present: tuple[int, ...]) -> Float[Tensor, "t b"]:
        """They sum to the number of terms for every image; all are 1 at the start."""
        theta = self.theta[list(present)]
        scores = (theta[:, None, :] * summary.detach().float()[None]) @ self.v
        return torch.softmax(scores, dim=0) * len(present)


BALANCINGS: Final[dict[str, Callable[[int, int], Balancing]]] = {
    "naive": lambda num_terms, summary_dim: Naive(),
    "uncertainty": lambda num_terms, summary_dim: Uncertainty(num_terms),
    "adaloss": lambda num_terms, summary_dim: AdaLoss(num_terms),
    "amtml-kd": AmtmlKd,
}
"""Name -> how to make it for a number of terms and a width of the student's summary."""
