"""Pictures of a run: an image, what the cache says of it, and what the student says, in the same colours, a row a teacher."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from radio_cache.storage.local import write_atomically
from radio_cache.view import PcaColours, png_bytes

_CELL_PX, _GAP_PX = 160, 4
PICTURES = "pictures"


def picture(
    pixels: NDArray[np.uint8], maps: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
) -> NDArray[np.uint8]:
    """pixels (b, h, w, 3): what the student saw. maps: teacher -> targets and guesses, both (b, h, w, c).

    Columns are image, targets, guesses, for one image beside the other; rows are teachers. Equal colours are equal features:
    three principal components of a teacher's targets.
    """
    images = len(pixels)
    side = _CELL_PX + _GAP_PX
    canvas = np.full((len(maps) * side - _GAP_PX, 3 * images * side - _GAP_PX, 3), 255, np.uint8)
    for row, (targets, guesses) in enumerate(maps.values()):
        basis = PcaColours.fit(targets)
        for number in range(images):
            cells = (pixels[number], basis.colours(targets[number]), basis.colours(guesses[number]))
            for column, cell in enumerate(cells):
                left, top = (3 * number + column) * side, row * side
                canvas[top : top + _CELL_PX, left : left + _CELL_PX] = _enlarged(cell)
    return canvas


def save_picture(out: Path, step: int, canvas: NDArray[np.uint8]) -> Path:
    """Write `pictures/step-<step>.png` of a run."""
    path = out / PICTURES / f"step-{step:08d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, png_bytes(canvas))
    return path


def _enlarged(cell: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(cell).resize((_CELL_PX, _CELL_PX), Image.Resampling.NEAREST))
