"""Distances between what a student says of a teacher and what the teacher says, one value per image.

Weighting teachers, reducing over the batch and logging are the trainer's. Everything is computed in float32.
Source of the objective: AM-RADIO, arXiv 2312.06709, Eq. 1-3; of the squared error: PHI-S, arXiv 2410.01680.
"""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from radio_cache.errors import ShapeError


def summary_cosine(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """Cosine distance between summaries, one value per image.

    Shapes: b images; d = teacher width.
    Units: none; 0 is the same direction, 1 a right angle, 2 the opposite direction. Lengths do not matter.
    Raises: ShapeError, with both shapes, if they differ.
    Source: AM-RADIO, arXiv 2312.06709, Eq. 1.
    """
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ShapeError(f"summaries differ: student {_listed(student)}, teacher {_listed(teacher)}; both are (b, d).")
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)


def spatial_match(
    student: Float[Tensor, "b n d"], teacher: Float[Tensor, "b n d"], valid: Bool[Tensor, "b n"],
    *, cos_weight: float, l1_weight: float,
) -> Float[Tensor, " b"]:  # fmt: skip
    """Weighted cosine plus smooth-L1 distance between tokens, one value per image.

    Shapes: b images; n = grid_h * grid_w tokens, row-major from the top left; d = teacher width.
    Units: none; 0 is a perfect match, the cosine part lies in [0, 2] times its weight. Both inputs are standardised per
        channel (mean 0, std 1); otherwise the bend of smooth-L1 at 1 means nothing. Its mean is over the channels.
    Padding: tokens with valid False do not count, but must be finite. Each image has at least one valid token: the
        reader checks that on the CPU, because checking here would wait for the device.
    Raises: ShapeError, with the shapes, if b, n or d differ.
    Source: AM-RADIO, arXiv 2312.06709, Eq. 2-3 (there, weights 0.9 and 0.1). Differs: masks padding.
    """
    _check_tokens(student, teacher, valid)
    student, teacher = student.float(), teacher.float()
    cosine = 1 - F.cosine_similarity(student, teacher, dim=-1)
    smooth_l1 = F.smooth_l1_loss(student, teacher, reduction="none", beta=1.0).mean(-1)
    return _mean_over_valid(cos_weight * cosine + l1_weight * smooth_l1, valid)


def spatial_mse(
    student: Float[Tensor, "b n d"], teacher: Float[Tensor, "b n d"], valid: Bool[Tensor, "b n"]
) -> Float[Tensor, " b"]:
    """Mean squared error between tokens, averaged over channels and valid tokens, one value per image.

    Shapes: as in `spatial_match`.
    Units: the square of the teacher's; with targets of variance 1, as PHI-S gives, predicting the mean scores 1.
    Padding: as in `spatial_match`.
    Raises: ShapeError, with the shapes, if b, n or d differ.
    Source: PHI-S, arXiv 2410.01680, the objective on normalised targets. Differs: masks padding.
    """
    _check_tokens(student, teacher, valid)
    return _mean_over_valid((student.float() - teacher.float()).square().mean(-1), valid)


def _mean_over_valid(per_token: Float[Tensor, "b n"], valid: Bool[Tensor, "b n"]) -> Float[Tensor, " b"]:
    return per_token.masked_fill(~valid, 0).sum(1) / valid.sum(1)


def _check_tokens(student: Tensor, teacher: Tensor, valid: Tensor) -> None:
    if student.ndim != 3 or student.shape != teacher.shape or valid.shape != student.shape[:2]:
        raise ShapeError(
            f"spatial features differ: student {_listed(student)}, teacher {_listed(teacher)}, valid {_listed(valid)}; "
            f"they are (b, n, d), (b, n, d) and (b, n)."
        )


def _listed(tensor: Tensor) -> str:
    return f"({', '.join(str(size) for size in tensor.shape)})"
