"""Windowed attention for ViTs (ViTDet, arXiv 2203.16527): which blocks stay global, and the order of the tokens.

Tokens are put into window-major order once; a windowed block sees every window as an image of its own. Class tokens and
registers sit windowed blocks out and join again at global ones. There is no padding: windows divide the grid.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

DRAW_SEED = 42  # the same on all ranks, so that all of them take the same time for a step


def global_blocks(depth: int, *, num_global: int, num_windowed: int | None) -> frozenset[int]:
    """Return the indices of the blocks with global attention: the last of every period, and the last of all.

    The period is num_windowed + 1 where that is given, else depth / num_global rounded down, but at least 1.
    """
    period = max(depth // num_global, 1) if num_windowed is None else num_windowed + 1
    return frozenset(i for i in range(depth) if i % period == period - 1) | {depth - 1}


def to_window_order(tokens: Float[Tensor, "b n c"], grid_hw: tuple[int, int], window: int) -> Float[Tensor, "b n c"]:
    """Sort row-major tokens by window (row-major, too), row-major within each window of window x window tokens."""
    (h, w), c = grid_hw, tokens.shape[-1]
    # (b, rows, y, columns, x, c) -> (b, rows, columns, y, x, c) -> (b, h * w, c)
    return tokens.view(-1, h // window, window, w // window, window, c).transpose(2, 3).reshape(-1, h * w, c)


def to_row_order(tokens: Float[Tensor, "b n c"], grid_hw: tuple[int, int], window: int) -> Float[Tensor, "b n c"]:
    """Invert `to_window_order`."""
    (h, w), c = grid_hw, tokens.shape[-1]
    # (b, rows, columns, y, x, c) -> (b, rows, y, columns, x, c) -> (b, h * w, c)
    return tokens.view(-1, h // window, w // window, window, window, c).transpose(2, 3).reshape(-1, h * w, c)


def draw_window(windows: Sequence[int], grid_hw: tuple[int, int], probability: float, draw: int) -> int | None:
    """Draw the window of a training step: with `probability` one of those that divide the grid, else None.

    Args:
        windows: candidates, in tokens.
        grid_hw: tokens of an image.
        probability: of a window.
        draw: number of the draw. It decides the window, on every rank and after a resume.
    """
    fitting = [window for window in windows if grid_hw[0] % window == 0 and grid_hw[1] % window == 0]
    generator = torch.Generator().manual_seed(DRAW_SEED * 1_000_003 + draw)
    # A generator of its own, seeded by the draw: the window depends on no other random numbers of the process.
    lot, choice = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    return fitting[int(choice * len(fitting))] if fitting and lot < probability else None
