"""The linear probe: batch normalisation and one 1x1 convolution on frozen maps, trained on pixel labels.

Protocol of AM-RADIO (arXiv 2312.06709) on ADE20K, which is that of DINOv2: AdamW at 1e-3 without weight decay, linear
warm-up from 1e-6, then falling linearly to 0; cross-entropy at the resolution of the labels.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Float, Int16
from numpy.typing import NDArray
from torch import Tensor, nn

from evals.errors import EvalError
from evals.segmentation.masks import IGNORED
from radio_cache.errors import ConfigError
from radio_cache.prefetch.ordered import prefetch_map

PAPER_STEPS, PAPER_WARMUP, PAPER_BATCH, PAPER_LR = 80_000, 1_500, 16, 1e-3
# As a share of the peak rate.
_WARMUP_FROM = 1e-6
_MAX_PASSES, _MIN_STEPS = 100, 300

Batch = tuple[NDArray[np.float32], NDArray[np.int16]]
"""Maps (b, h, w, c) and classes (b, H, W), IGNORED for unlabelled pixels."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Settings of probe training. The warm-up keeps the paper's share of the steps.

    Attributes:
        steps: None takes the paper's 80,000, or 100 passes over the windows if those are fewer, and at least 300.
        batch: windows in a step.
        lr: peak learning rate.
        seed: of the weights and of the order of windows.
    """

    steps: int | None = None
    batch: int = PAPER_BATCH
    lr: float = PAPER_LR
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is not None and self.steps < 1) or self.batch < 1 or not self.lr > 0:
            raise ConfigError(f"a probe needs at least one step, one window a batch and a rate above 0: {self}")

    def steps_for(self, windows: int) -> int:
        """Return the number of steps for this many training windows."""
        steps_of_passes = -(-windows * _MAX_PASSES // self.batch)  # rounded up
        return self.steps or min(PAPER_STEPS, max(_MIN_STEPS, steps_of_passes))


@final
class LinearProbe(nn.Module):
    """Maps features (b, c, h, w) to logits (b, classes, h, w). Weights start as N(0, 0.01), biases at 0."""

    def __init__(self, width: int, classes: int, *, seed: int) -> None:
        super().__init__()
        # Encoders differ in scale by orders of magnitude: normalisation lets one learning rate serve all.
        self.norm = nn.BatchNorm2d(width)
        self.classify = nn.Conv2d(width, classes, 1)
        # A generator of its own: the global random state does not change the probe.
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.classify.weight.copy_(0.01 * torch.randn(self.classify.weight.shape, generator=generator))
            nn.init.zeros_(self.classify.bias if self.classify.bias is not None else torch.zeros(0))

    def forward(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        """Return the logits of k classes."""
        return self.classify(self.norm(maps))


def train_probe(
    read: Callable[[NDArray[np.int64]], Batch],
    windows: int,
    *,
    width: int,
    classes: int,
    config: ProbeConfig,
    device: torch.device,
    on_step: Callable[[int, int], None] | None = None,
) -> LinearProbe:
    """Train a probe; every window is used once per pass, in random order.

    Args:
        read: returns the maps and classes of windows by their numbers.
        windows: number of training windows.
        width: channels of the maps.
        classes: number of classes.
        config: of the training.
        device: of the probe.
        on_step: called with the number of steps done and their total.

    Returns:
        The probe in eval mode.

    Raises:
        EvalError: if the loss is not finite, or no pixel is labelled.
    """
    steps = config.steps_for(windows)
    probe = LinearProbe(width, classes, seed=config.seed).to(device).train()
    optimiser = torch.optim.AdamW(probe.parameters(), lr=config.lr, weight_decay=0.0)
    # At least one step at the low rate, however short the training is.
    warmup = max(1, round(steps * PAPER_WARMUP / PAPER_STEPS))
    labelled = False
    # Maps are decoded two batches at a time while the device trains.
    with ThreadPoolExecutor(2, thread_name_prefix="maps") as pool:
        for step, (maps, labels) in enumerate(prefetch_map(pool, read, _batches(windows, steps, config), depth=4)):
            # One formula is plainer than two chained schedulers of torch.
            for group in optimiser.param_groups:
                group["lr"] = config.lr * learning_rate(step, steps, warmup)
            targets = torch.from_numpy(labels).to(device)
            # Cross-entropy over no pixel is NaN: such a batch is skipped.
            if not bool((targets != IGNORED).any()):
                continue
            labelled = True
            # (b, h, w, c) -> (b, c, h, w)
            loss = pixel_loss(probe(torch.from_numpy(maps).to(device).permute(0, 3, 1, 2)), targets)
            # Checked before the step, which would spread NaN to the weights.
            if not bool(torch.isfinite(loss)):
                raise EvalError(
                    f"the probe's loss is {loss.item()} at step {step}: the maps hold values that are not finite"
                )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            if on_step is not None:
                on_step(step + 1, steps)
    if not labelled:
        raise EvalError("no pixel of the training masks has a class: all are ignored")
    return probe.eval()


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Return the share of the peak rate at a step: linear from 1e-6 to 1, then linear to 0.

    Args:
        step: from 0.
        steps: of the training.
        warmup: steps until the peak.
    """
    if step < warmup:
        return _WARMUP_FROM + (1 - _WARMUP_FROM) * step / warmup
    return (steps - step) / max(1, steps - warmup)


def pixel_loss(logits: Float[Tensor, "b k h w"], classes: Int16[Tensor, "b y x"]) -> Float[Tensor, ""]:
    """Return the cross-entropy over labelled pixels, logits resized to the labels (bilinear)."""
    h, w = classes.shape[1:]
    if logits.shape[2:] != (h, w):
        logits = nn.functional.interpolate(logits, size=(h, w), mode="bilinear", align_corners=False)
    return nn.functional.cross_entropy(logits, classes.long(), ignore_index=IGNORED)


def _batches(windows: int, steps: int, config: ProbeConfig) -> Iterator[NDArray[np.int64]]:
    """Yield the window numbers of every step; a batch may span two passes."""
    rng = np.random.default_rng(config.seed)
    queue = np.zeros(0, np.int64)
    for _ in range(steps):
        # A set smaller than a batch gives batches of its own size.
        while len(queue) < min(config.batch, windows):
            queue = np.concatenate([queue, rng.permutation(windows)])
        yield queue[: config.batch]
        queue = queue[config.batch :]
