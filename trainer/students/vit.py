"""ViT with cropped position embeddings: the student of AM-RADIO (arXiv 2312.06709) that takes any resolution.

One position table, far larger than any one grid, is learned by showing each training image a random crop of it; at
evaluation the top-left part of the resized table is used. There is one class token per summary teacher, registers, and
no final norm.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from radio_cache.errors import ConfigError
from trainer.students.base import Encoded, Student


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """One ViT. `registers=None` fills class tokens and registers up to a multiple of 8, as RADIOv2.5 does."""

    name: str
    width: int
    depth: int
    heads: int
    patch_size: int = 16  # pixels
    num_summary_tokens: int = 1  # class tokens, one per summary teacher
    registers: int | None = None
    max_resolution: int = 2048  # pixels; the position table covers this square
    position_drop: float = 0.1  # share of training images shown without any position
    preferred_resolution: tuple[int, int] = (432, 432)  # height, width in pixels

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"{self.name}: width {self.width} is not divisible by {self.heads} heads.")
        if self.num_summary_tokens < 1:
            raise ConfigError(f"{self.name}: num_summary_tokens is at least 1, got {self.num_summary_tokens}.")
        if not 0 <= self.position_drop < 1:
            raise ConfigError(f"{self.name}: position_drop is in [0, 1), got {self.position_drop}.")

    @property
    def num_registers(self) -> int:
        return 8 - self.num_summary_tokens % 8 if self.registers is None else self.registers

    @property
    def table_side(self) -> int:
        return round(self.max_resolution / self.patch_size)


VERSIONS: dict[str, ViTConfig] = {
    config.name: config
    for config in (
        # For a CPU at 64 to 128 px: a smaller table, because few images are seen per position.
        ViTConfig(name="vit-tiny-16", width=192, depth=6, heads=3, max_resolution=512, preferred_resolution=(96, 96)),
        ViTConfig(name="vit-s-16", width=384, depth=12, heads=6),
        ViTConfig(name="vit-b-16", width=768, depth=12, heads=12),
        ViTConfig(name="vit-l-16", width=1024, depth=24, heads=16),
        ViTConfig(name="vit-h-16", width=1280, depth=32, heads=16),
        ViTConfig(name="vit-s-14", width=384, depth=12, heads=6, patch_size=14, preferred_resolution=(378, 378)),
        ViTConfig(name="vit-b-14", width=768, depth=12, heads=12, patch_size=14, preferred_resolution=(378, 378)),
        ViTConfig(name="vit-l-14", width=1024, depth=24, heads=16, patch_size=14, preferred_resolution=(378, 378)),
        ViTConfig(name="vit-h-14", width=1280, depth=32, heads=16, patch_size=14, preferred_resolution=(378, 378)),
    )
}


@final
class ViT(Student):
    """The summary is the class tokens side by side: (B, num_summary_tokens * width)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(
            name=config.name,
            patch_size=config.patch_size,
            embed_dim=config.width,
            summary_dim=config.num_summary_tokens * config.width,
            num_summary_tokens=config.num_summary_tokens,
            min_resolution_step=config.patch_size,
            preferred_resolution=config.preferred_resolution,
            no_weight_decay=frozenset({"positions.table", "tokens"}),
        )
        self.config = config
        self.embed = nn.Linear(3 * config.patch_size**2, config.width, bias=False)
        self.positions = CroppedPositions(config.table_side, config.width, drop=config.position_drop)
        # Class tokens first, then registers; neither gets a position.
        self.tokens = nn.Parameter(
            torch.randn(config.num_summary_tokens + config.num_registers, config.width) * config.width**-0.5
        )
        self.blocks = nn.Sequential(*(Block(config.width, config.heads) for _ in range(config.depth)))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]  # the stubs forget bias=False
                    nn.init.zeros_(module.bias)

    def _encode(self, images: Float[Tensor, "b 3 h w"]) -> Encoded:
        b, _, h, w = images.shape
        grid_hw = h // self.patch_size, w // self.patch_size
        x = self.positions(self.embed(cut_patches(images, self.patch_size)), grid_hw)
        x = self.blocks(torch.cat([self.tokens.to(x.dtype).expand(b, -1, -1), x], dim=1))
        summary = x[:, : self.num_summary_tokens].flatten(1)
        spatial = x[:, self.tokens.shape[0] :]
        return Encoded(summary, spatial.transpose(1, 2).unflatten(2, grid_hw))


def cut_patches(images: Float[Tensor, "b 3 h w"], patch_size: int) -> Float[Tensor, "b n p"]:
    """Square patches, row-major from the top left, each flattened as (channel, y, x)."""
    b, c, h, w = images.shape
    p = patch_size
    return images.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * p * p)


@final
class CroppedPositions(nn.Module):
    """Adds to each token its position, read from a table of side * side learned positions.

    Training shows every image its own random crop of the table, so that the student learns any size and aspect. The
    crops come from PyTorch's generator of the images' device, as dropout does. Evaluation resizes the table to a square
    of the longer side of the grid and uses the top left of it. Both are computed in float32.
    Source: AM-RADIO, arXiv 2312.06709, section 3 (cropped position embeddings, from RO-ViT).
    """

    def __init__(self, side: int, width: int, *, drop: float) -> None:
        super().__init__()
        self.side = side
        self.drop = drop
        self.table = nn.Parameter(torch.randn(side * side, width) * width**-0.5)

    def forward(self, tokens: Float[Tensor, "b n c"], grid_hw: tuple[int, int]) -> Float[Tensor, "b n c"]:
        if not self.training:
            return tokens + self.top_left(grid_hw).to(tokens.dtype)
        if grid_hw == (self.side, self.side):
            positions = self.table.float().expand_as(tokens)
        else:
            positions = self.read(*crop_points(tokens.shape[0], grid_hw, tokens.device))
        if self.drop > 0:
            kept = torch.rand(tokens.shape[0], 1, 1, device=tokens.device) >= self.drop
            positions = positions * kept
        return tokens + positions.to(tokens.dtype)

    def top_left(self, grid_hw: tuple[int, int]) -> Float[Tensor, "n c"]:
        """Positions of the evaluation: the table resized to a square of the longer side, its top left h x w."""
        h, w = grid_hw
        longer = max(h, w)
        table = self.table.float().T.reshape(1, -1, self.side, self.side)
        if longer != self.side:
            table = F.interpolate(table, (longer, longer), mode="bilinear", align_corners=False)
        return table[0, :, :h, :w].flatten(1).T

    def read(self, ys: Float[Tensor, "b h"], xs: Float[Tensor, "b w"]) -> Float[Tensor, "b n c"]:
        """Bilinear samples of the table at every (y, x); 0 and 1 are the centres of its first and last positions.

        The same as `grid_sample` with align_corners=True, but a weighted sum of four table rows per token needs no copy
        of the table per image, neither forward nor backward.
        """
        b, h, w = ys.shape[0], ys.shape[1], xs.shape[1]
        y, x = ys.float() * (self.side - 1), xs.float() * (self.side - 1)
        # The last cell also serves the far edge, where its weight is 1 for the far corner.
        y0, x0 = y.floor().clamp(0, max(self.side - 2, 0)), x.floor().clamp(0, max(self.side - 2, 0))
        y1, x1 = (y0 + 1).clamp(max=self.side - 1), (x0 + 1).clamp(max=self.side - 1)
        rows_bhk, columns_bwk = torch.stack([y0, y1], -1).long(), torch.stack([x0, x1], -1).long()
        fy_bhk, fx_bwk = torch.stack([1 - (y - y0), y - y0], -1), torch.stack([1 - (x - x0), x - x0], -1)
        index = rows_bhk[:, :, None, :, None] * self.side + columns_bwk[:, None, :, None, :]
        weight = fy_bhk[:, :, None, :, None] * fx_bwk[:, None, :, None, :]
        out = F.embedding_bag(
            index.reshape(-1, 4), self.table.float(), mode="sum", per_sample_weights=weight.reshape(-1, 4)
        )
        return out.view(b, h * w, -1)


def crop_points(
    batch: int, grid_hw: tuple[int, int], device: torch.device
) -> tuple[Float[Tensor, "b h"], Float[Tensor, "b w"]]:
    """Where, in a unit square, each row and column of each image's random crop lies.

    Scale s ~ U[sqrt(0.1), 1] and log aspect ~ U[ln 3/4, ln 4/3] give the sides min(1, s * a) and min(1, s / a) of the
    crop; its place is uniform; the points run from edge to edge inclusive.
    """
    h, w = grid_hw
    scale = torch.empty(batch, 1, device=device).uniform_(math.sqrt(0.1), 1)
    aspect = torch.empty(batch, 1, device=device).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    span_x, span_y = (scale * aspect).clamp(max=1), (scale / aspect).clamp(max=1)
    left = torch.rand(batch, 1, device=device) * (1 - span_x)
    top = torch.rand(batch, 1, device=device) * (1 - span_y)
    ys = top + span_y * torch.linspace(0, 1, h, device=device)
    xs = left + span_x * torch.linspace(0, 1, w, device=device)
    return ys, xs


@final
class Block(nn.Module):
    """Pre-norm transformer block: attention and an MLP four times as wide, both with biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
        return x + self.mlp(self.norm2(x))
