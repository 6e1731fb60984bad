"""Pictures of a run: images beside the cached and the predicted features in the same colours, one row a teacher."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from radio_cache.storage.local import write_atomically
from radio_cache.view import PcaColours, png_bytes

_CELL_PX, _GAP_PX = 160, 4
PICTURES = "pictures"


def feature_picture(
    pixels: NDArray[np.uint8], maps: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
) -> NDArray[np.uint8]:
    """Return a picture (h, w, 3) of crops, targets and predictions.

    Columns are crop, targets and predictions of each image; rows are teachers. Colours are three principal components of a
    teacher's targets, so that equal colours are equal features.

    Args:
        pixels: (b, h, w, 3) crops.
        maps: teacher -> targets and predictions, both (b, h, w, c).
    """
    num_images = len(pixels)
    side = _CELL_PX + _GAP_PX
    canvas = np.full((len(maps) * side - _GAP_PX, 3 * num_images * side - _GAP_PX, 3), 255, np.uint8)
    for row, (targets, predictions) in enumerate(maps.values()):
        # Fitted to the targets alone: predictions that differ show as other colours.
        basis = PcaColours.fit(targets)
        for number in range(num_images):
            cells = (pixels[number], basis.colours(targets[number]), basis.colours(predictions[number]))
            for column, cell in enumerate(cells):
                left, top = (3 * number + column) * side, row * side
                canvas[top : top + _CELL_PX, left : left + _CELL_PX] = _enlarged(cell)
    return canvas


def save_picture(out: Path, step: int, canvas: NDArray[np.uint8]) -> Path:
    """Write a picture to `pictures/step-<step>.png` of a run, and return its path."""
    path = out / PICTURES / f"step-{step:08d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, png_bytes(canvas))
    return path


def _enlarged(cell: NDArray[np.uint8]) -> NDArray[np.uint8]:
    # Nearest: the borders of tokens stay visible.
    return np.asarray(Image.fromarray(cell).resize((_CELL_PX, _CELL_PX), Image.Resampling.NEAREST))
