"""Predictions and scores: from a probe's logits of windows to classes of pixels, and to IoU over many images."""

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
    """Return (h, w) the likeliest class of every pixel of one image; IGNORED where no window covers it.

    Logits are resized to the window (bilinear), averaged where windows overlap, and resized to the image.

    Args:
        logits: of all windows of the image; k classes.
        windows: of one image.
        window_hw: of a window, frame pixels.
        image_hw: of the image, pixels.
    """
    frame_h, frame_w = windows[0].frame_hw
    total = logits.new_zeros(logits.shape[1], frame_h, frame_w)
    num_windows = logits.new_zeros(frame_h, frame_w)
    for window_logits, window in zip(logits, windows, strict=True):
        at_pixels = interpolate(window_logits[None], size=window_hw, mode="bilinear", align_corners=False)[0]
        # A window may reach into the padding beyond the frame: only the part inside the frame counts.
        top, left = max(0, window.top), max(0, window.left)
        bottom, right = min(frame_h, window.top + window_hw[0]), min(frame_w, window.left + window_hw[1])
        inside = at_pixels[:, top - window.top : bottom - window.top, left - window.left : right - window.left]
        # Logits are averaged, not probabilities: a window that is sure weighs more.
        total[:, top:bottom, left:right] += inside
        num_windows[top:bottom, left:right] += 1
    # Where no window reaches, the sum stays 0 and is ignored below.
    total /= num_windows.clamp(min=1)
    # All classes at image size may not fit in memory: the running best is kept over chunks of classes.
    best, classes = None, torch.zeros(image_hw, dtype=torch.int16, device=logits.device)
    # The number of classes resized at once, from the number of pixels.
    step = max(1, _CHUNK_CELLS // (image_hw[0] * image_hw[1]))
    for first in range(0, len(total), step):
        sized = interpolate(total[None, first : first + step], size=image_hw, mode="bilinear", align_corners=False)[0]
        value, class_in_chunk = sized.max(dim=0)
        # Strictly greater: ties go to the lower class, as argmax does.
        better = torch.ones_like(value, dtype=torch.bool) if best is None else value > best
        classes[better] = (class_in_chunk[better] + first).to(torch.int16)
        best = value if best is None else torch.maximum(best, value)
    uncovered = interpolate((num_windows == 0).float()[None, None], size=image_hw, mode="nearest")[0, 0] > 0
    classes[uncovered] = IGNORED
    return classes.cpu().numpy()


@dataclass(frozen=True)
class Scores:
    """Segmentation scores, shares in [0, 1].

    Attributes:
        mean_iou: over the classes with an IoU.
        pixel_accuracy: share of correct pixels.
        iou: of every class; None for one that neither the truth nor the prediction holds.
        pixels: number of pixels of each true class.
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
        """Count the pixels of two class maps (h, w) of one size; IGNORED in either does not count."""
        counted = (truth != IGNORED) & (predicted != IGNORED)
        size = len(self._counts)
        # One bincount: the cell of true class t and predicted class p is t * size + p.
        cells = truth[counted].astype(np.int64) * size + predicted[counted]
        self._counts += np.bincount(cells, minlength=size * size).reshape(size, size)

    def scores(self) -> Scores:
        """Return the scores of all pixels added so far."""
        hits = np.diag(self._counts)
        # Row sums are true pixels, column sums predicted ones; the diagonal is in both.
        union = self._counts.sum(axis=0) + self._counts.sum(axis=1) - hits
        iou = tuple(float(hit / all_) if all_ else None for hit, all_ in zip(hits, union, strict=True))
        defined_iou = [value for value in iou if value is not None]
        return Scores(
            mean_iou=float(np.mean(defined_iou)) if defined_iou else 0.0,
            iou=iou,
            pixels=tuple(self._counts.sum(axis=1).tolist()),
            pixel_accuracy=float(hits.sum() / max(1, self._counts.sum())),
        )
