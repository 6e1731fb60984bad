"""Several small images as one large one, for a student at the size of a teacher such as SAM (RADIOv2.5, arXiv 2412.07679).

A mosaic of 2 x 2 fills 1024 pixels with four crops of 512: a fresh crop each, with its own target, so that images smaller than
the teacher's input need not be enlarged. What a student says of a mosaic is cut into its images again before it is compared.
"""

from jaxtyping import Float
from torch import Tensor

from trainer.students.base import StudentOutput


def joined(images: Float[Tensor, "b 3 h w"], side: int) -> Float[Tensor, "m 3 i j"]:
    """Each side * side images that follow one another become one, row by row from the top left."""
    h, w = images.shape[2:]
    return images.unflatten(0, (-1, side, side)).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, side * h, side * w)


def cut(said: StudentOutput, grid_hw: tuple[int, int], side: int) -> StudentOutput:
    """What was said of mosaics, by image; the summary of each is the mosaic's. grid_hw: tokens of one image."""
    h, w = grid_hw
    tiles = said.spatial.unflatten(1, (side, h, side, w)).transpose(2, 3).flatten(3, 4).flatten(0, 2)
    return StudentOutput(said.summary.repeat_interleave(side * side, 0), tiles)
