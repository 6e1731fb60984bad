"""Cropped position embeddings: one large table of positions, of which each training image sees a random crop."""

import math
from typing import cast, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@final
class CroppedPositions(nn.Module):
    """Adds to each token its position, read from a table of side * side learned positions.

    In training every image uses its own random crop of the table, so that the student learns any size and aspect. The
    crops are drawn by PyTorch's generator of the images' device, like dropout. Evaluation resizes the table to a square
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
            has_position = torch.rand(tokens.shape[0], 1, 1, device=tokens.device) >= self.drop
            positions = positions * has_position
        return tokens + positions.to(tokens.dtype)

    def top_left(self, grid_hw: tuple[int, int]) -> Float[Tensor, "n c"]:
        """Return the positions of evaluation: the top left h x w of the table, resized to a square of the longer side."""
        h, w = grid_hw
        longer = cast(int, torch.sym_max(h, w))  # numbers, or symbols in a graph of free size
        # (side * side, c) -> (1, c, side, side)
        table = self.table.float().T.reshape(1, -1, self.side, self.side)
        if isinstance(longer, torch.SymInt) or longer != self.side:
            table = F.interpolate(table, (longer, longer), mode="bilinear", align_corners=False)
        # -> (c, h, w) -> (h * w, c)
        cropped = table[0, :, :h, :w]
        if isinstance(longer, torch.SymInt):  # whether it lies in one piece must not depend on the size
            cropped = cropped.clone(memory_format=torch.contiguous_format)
        return cropped.flatten(1).T

    def read(self, ys: Float[Tensor, "b h"], xs: Float[Tensor, "b w"]) -> Float[Tensor, "b n c"]:
        """Sample the table bilinearly at every (y, x). 0 and 1 are the centres of its first and last positions.

        Equals `grid_sample` with align_corners=True, but a weighted sum of four table rows per token needs no copy
        of the table per image, neither forward nor backward.
        """
        b, h, w = ys.shape[0], ys.shape[1], xs.shape[1]
        y, x = ys.float() * (self.side - 1), xs.float() * (self.side - 1)
        # The last cell also serves the far edge, where its weight is 1 for the far corner.
        y0, x0 = y.floor().clamp(0, max(self.side - 2, 0)), x.floor().clamp(0, max(self.side - 2, 0))
        y1, x1 = (y0 + 1).clamp(max=self.side - 1), (x0 + 1).clamp(max=self.side - 1)
        rows_bhk, columns_bwk = torch.stack([y0, y1], -1).long(), torch.stack([x0, x1], -1).long()
        fy_bhk, fx_bwk = torch.stack([1 - (y - y0), y - y0], -1), torch.stack([1 - (x - x0), x - x0], -1)
        # (b, h, 1, 2, 1) and (b, 1, w, 1, 2) -> (b, h, w, 2, 2): the four corners of each token
        index = rows_bhk[:, :, None, :, None] * self.side + columns_bwk[:, None, :, None, :]
        weight = fy_bhk[:, :, None, :, None] * fx_bwk[:, None, :, None, :]
        out = F.embedding_bag(
            index.reshape(-1, 4), self.table.float(), mode="sum", per_sample_weights=weight.reshape(-1, 4)
        )
        return out.view(b, h * w, -1)


def crop_points(
    batch: int, grid_hw: tuple[int, int], device: torch.device
) -> tuple[Float[Tensor, "b h"], Float[Tensor, "b w"]]:
    """Draw a random crop per image and return the positions of its rows and columns in the unit square.

    Scale s ~ U[sqrt(0.1), 1] and log aspect ~ U[ln 3/4, ln 4/3] give the sides min(1, s * a) and min(1, s / a) of the
    crop; its position is uniform. The points include both edges.
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
