"""From a probe's logits of windows to the class of every pixel of an image, and to scores over many images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from evals.segmentation.masks import IGNORED
from evals.segmentation.windows import Window

_CHUNK_CELLS = 1 << 26
"""Classes x pixels resized at once: 256 MB."""


def predicted_classes(
    logits: Float[Tensor, "n k h w"], windows: Sequence[Window], window_hw: tuple[int, int], image_hw: tuple[int, int]
) -> NDArray[np.int16]:
    """(h, w) the likeliest class of every pixel of one image; IGNORED where no window saw it.

    Logits are resized to the window (bilinear), averaged where windows overlap, and resized to the image.
    """
    frame_h, frame_w = windows[0].frame_hw
    total = logits.new_zeros(logits.shape[1], frame_h, frame_w)
    seen = logits.new_zeros(frame_h, frame_w)
    for one, window in zip(logits, windows, strict=True):
        at_pixels = interpolate(one[None], size=window_hw, mode="bilinear", align_corners=False)[0]
        top, left = max(0, window.top), max(0, window.left)
        bottom, right = min(frame_h, window.top + window_hw[0]), min(frame_w, window.left + window_hw[1])
        part = at_pixels[:, top - window.top : bottom - window.top, left - window.left : right - window.left]
        total[:, top:bottom, left:right] += part
        seen[top:bottom, left:right] += 1
    total /= seen.clamp(min=1)
    best, classes = None, torch.zeros(image_hw, dtype=torch.int16, device=logits.device)
    step = max(1, _CHUNK_CELLS // (image_hw[0] * image_hw[1]))
    for first in range(0, len(total), step):
        sized = interpolate(total[None, first : first + step], size=image_hw, mode="bilinear", align_corners=False)[0]
        value, which = sized.max(dim=0)
        better = torch.ones_like(value, dtype=torch.bool) if best is None else value > best
        classes[better] = (which[better] + first).to(torch.int16)
        best = value if best is None else torch.maximum(best, value)
    unseen = interpolate((seen == 0).float()[None, None], size=image_hw, mode="nearest")[0, 0] > 0
    classes[unseen] = IGNORED
    return classes.cpu().numpy()


@dataclass(frozen=True)
class Scores:
    """Shares in [0, 1]. iou: of every class; None for one that neither the truth nor the prediction holds.

    mean_iou: over the other classes. pixel_accuracy: pixels that are right. pixels: how many of each true class there were.
    """

    mean_iou: float
    pixel_accuracy: float
    iou: tuple[float | None, ...]
    pixels: tuple[int, ...]


@final
class Confusion:
    """Counts of (true class, predicted class) over pixels with both."""

    def __init__(self, classes: int) -> None:
        self._counts = np.zeros((classes, classes), np.int64)

    def add(self, truth: NDArray[np.int16], predicted: NDArray[np.int16]) -> None:
        """Two pictures (h, w) of one size."""
        known = (truth != IGNORED) & (predicted != IGNORED)
        size = len(self._counts)
        cells = truth[known].astype(np.int64) * size + predicted[known]
        self._counts += np.bincount(cells, minlength=size * size).reshape(size, size)

    def scores(self) -> Scores:
        hits = np.diag(self._counts)
        union = self._counts.sum(axis=0) + self._counts.sum(axis=1) - hits
        iou = tuple(float(hit / all_) if all_ else None for hit, all_ in zip(hits, union, strict=True))
        there = [value for value in iou if value is not None]
        return Scores(
            mean_iou=float(np.mean(there)) if there else 0.0,
            iou=iou,
            pixels=tuple(self._counts.sum(axis=1).tolist()),
            pixel_accuracy=float(hits.sum() / max(1, self._counts.sum())),
        )
