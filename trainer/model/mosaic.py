"""Several small images as one large one, for a student at the size of a teacher such as SAM (RADIOv2.5, arXiv 2412.07679).

A mosaic of 2 x 2 fills 1024 pixels with four crops of 512: a fresh crop each, with its own target, so that images smaller than
the teacher's input need not be enlarged. The student's features of a mosaic are split into those of its images before the losses.
"""

from jaxtyping import Float
from torch import Tensor

from trainer.students.base import StudentOutput


def make_mosaics(images: Float[Tensor, "b 3 h w"], side: int) -> Float[Tensor, "m 3 i j"]:
    """Join each side * side consecutive images into one, row by row from the top left."""
    h, w = images.shape[2:]
    # (m * side * side, 3, h, w) -> (m, 3, side * h, side * w)
    return images.unflatten(0, (-1, side, side)).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, side * h, side * w)


def split_mosaics(output: StudentOutput, grid_hw: tuple[int, int], side: int) -> StudentOutput:
    """Split the features of mosaics into those of their images; each image gets the summary of its mosaic.

    Args:
        output: (m, ...) summaries and tokens of the mosaics.
        grid_hw: tokens of one image.
        side: images along each side of a mosaic.
    """
    h, w = grid_hw
    # (m, side * h * side * w, c) -> (m * side * side, h * w, c)
    tiles = output.spatial.unflatten(1, (side, h, side, w)).transpose(2, 3).flatten(3, 4).flatten(0, 2)
    return StudentOutput(output.summary.repeat_interleave(side * side, 0), tiles)
