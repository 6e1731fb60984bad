"""The transformer block of the ViT students, as timm's: pre-norm attention and an MLP, plain or gated."""

from typing import final

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@final
class Block(nn.Module):
    """Pre-norm transformer block: attention through PyTorch's fused kernel, and an MLP; all with biases.

    hidden: width inside the MLP. gated: SwiGLU, as in DINOv2's ViT-g, whose first matrix is then twice as high.
    """

    def __init__(self, width: int, heads: int, *, hidden: int, gated: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        first = nn.Linear(width, 2 * hidden if gated else hidden)
        self.mlp = nn.Sequential(first, Gate() if gated else nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        x = x + self._attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        # A function of its own, so that queries, keys and values are freed before the MLP needs memory.
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


@final
class Gate(nn.Module):
    """SiLU of the first half of the channels, times the second half (SwiGLU, arXiv 2002.05202)."""

    def forward(self, x: Float[Tensor, "b n c2"]) -> Float[Tensor, "b n c"]:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value
