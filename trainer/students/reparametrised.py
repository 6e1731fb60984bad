"""Linear weights computed from others while training: spectral reparametrisation and DAMP noise. Neither is exported.

Both are `torch.nn.utils.parametrize` parametrisations of `weight`; `plain_state` gives the weights they stand for.
"""

from typing import cast, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trainer.students.transformer_block import Block, Gate

ALPHA = 0.05  # least spectral norm of a weight
EPSILON = 1e-6
FIRST_ITERATIONS = 20


@final
class SpectralScale(nn.Module):
    """W * (softplus(s) + alpha) / (sigma(W) + epsilon), for each of `chunks` equal groups of rows on its own.

    s is learned and starts where the product is W itself. sigma, the largest singular value, comes from power iteration:
    one step per training forward, on stored vectors. It stops attention from collapsing onto few tokens at high
    resolution (AM-RADIO, arXiv 2312.06709, section 4; sigma-reparam, arXiv 2303.06296). Computed in float32.
    """

    def __init__(self, weight: Float[Tensor, "o i"], *, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        rows, columns = weight.shape[0] // chunks, weight.shape[1]
        self.left: Tensor
        self.right: Tensor
        self.register_buffer("left", torch.zeros(chunks, rows, device=weight.device))
        self.register_buffer("right", torch.zeros(chunks, columns, device=weight.device))
        # Three axes, so that weight decay reaches it.
        self.scale = nn.Parameter(torch.zeros(chunks, 1, 1, device=weight.device))

    @torch.no_grad()
    def right_inverse(self, weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        """Start from a weight and its norm. PyTorch calls this when a weight is assigned."""
        w = self._chunked(weight)
        # A generator of its own: switching this on must not change the weights that a seed gives.
        start = torch.randn(self.right.shape, generator=torch.Generator().manual_seed(0), device="cpu")
        self.right.copy_(F.normalize(start, dim=1))
        self._iterate(w, FIRST_ITERATIONS)
        above = (self._sigma(w) - ALPHA).clamp(min=1e-5)
        # The inverse of softplus, written so that large norms do not overflow.
        self.scale.copy_((above + torch.log(-torch.expm1(-above))).view(-1, 1, 1))
        return weight.clone()

    def forward(self, weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        w = self._chunked(weight)
        if self.training:
            self._iterate(w.detach(), 1)
        factor = (F.softplus(self.scale.float()) + ALPHA) / (self._sigma(w).view(-1, 1, 1) + EPSILON)
        return (w * factor).view_as(weight).to(weight.dtype)

    def _chunked(self, weight: Float[Tensor, "o i"]) -> Float[Tensor, "k m i"]:
        return weight.float().unflatten(0, (self.chunks, -1))

    @torch.no_grad()
    def _iterate(self, w: Float[Tensor, "k m i"], steps: int) -> None:
        left, right = self.left.float(), self.right.float()
        for _ in range(steps):
            left = F.normalize(_apply(w, right), dim=1)
            right = F.normalize(_apply(w.transpose(1, 2), left), dim=1)
        self.left.copy_(left)
        self.right.copy_(right)

    def _sigma(self, w: Float[Tensor, "k m i"]) -> Float[Tensor, " k"]:
        # Copies, because the next forward changes the buffers in place before this one's backward may have run.
        left, right = self.left.float().clone(), self.right.float().clone()
        return (left * _apply(w, right)).sum(1)


def _apply(w: Float[Tensor, "k m i"], vectors: Float[Tensor, "k i"]) -> Float[Tensor, "k m"]:
    return (w @ vectors.unsqueeze(-1)).squeeze(-1)


@final
class MultiplicativeNoise(nn.Module):
    """W * (1 + e), e ~ N(0, sigma^2), drawn anew in every training forward; W itself otherwise.

    Source: DAMP, "Improving robustness to corruptions with multiplicative weight perturbations"; C-RADIOv4 uses it
    and does not state the sigma.
    """

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        return weight * (1 + self.sigma * torch.randn_like(weight)) if self.training else weight

    def right_inverse(self, weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        return weight


def reparametrise(blocks: nn.Sequential, *, spectral: bool, damp_sigma: float) -> None:
    """Add either or both to every Linear of transformer blocks. Queries, keys and values count as three weights."""
    for block in blocks:
        assert isinstance(block, Block)
        chunks = {block.qkv: 3, block.proj: 1, cast(nn.Linear, block.mlp[2]): 1}
        chunks[cast(nn.Linear, block.mlp[0])] = 2 if isinstance(block.mlp[1], Gate) else 1
        for linear, count in chunks.items():
            if spectral:
                scale = SpectralScale(linear.weight, chunks=count)
                parametrize.register_parametrization(linear, "weight", scale)
            if damp_sigma > 0:
                parametrize.register_parametrization(linear, "weight", MultiplicativeNoise(damp_sigma))


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of `module` with plain weights: reparametrised ones by their value in evaluation."""
    # Not `remove_parametrizations` on a copy: copies share a class with the original, which loses its weights then.
    state = {name: value for name, value in module.state_dict().items() if ".parametrizations." not in name}
    for name, part in module.named_modules():
        if parametrize.is_parametrized(part, "weight"):
            training = part.training
            part.eval()
            state[f"{name}.weight"] = cast(Tensor, part.weight).detach().clone()
            part.train(training)
    return state
