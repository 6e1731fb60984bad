"""Losses between a student's prediction and a teacher's features, one value per image.

Weighting of teachers, reduction over the batch and logging are done by callers. Everything is computed in float32.

Source of the objective: AM-RADIO, arXiv 2312.06709, Eq. 1-3; of the squared error: PHI-S, arXiv 2410.01680; of the angle
and of shifted crops: C-RADIOv4, arXiv 2601.17237. `SUMMARY_LOSSES` and `SPATIAL_LOSSES` list those that need only
the features and a mask.
"""

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from radio_cache.errors import ShapeError


def summary_cosine(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """Return the cosine distance between summaries, one value per image.

    Args:
        student: (b, d) prediction.
        teacher: (b, d) target.

    Returns:
        (b,) 0 for the same direction, 1 for a right angle, 2 for the opposite direction. Lengths do not matter.

    Raises:
        ShapeError: if the shapes differ.

    Source: AM-RADIO, arXiv 2312.06709, Eq. 1.
    """
    _check_summaries(student, teacher)
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)


def summary_l1(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """Return the mean absolute difference over the channels, in the target's units. Shapes and errors as in `summary_cosine`.

    Source: AM-RADIO, arXiv 2312.06709, where it and the next two did worse than the cosine.
    """
    _check_summaries(student, teacher)
    # (b, d) -> (b,)
    return (student.float() - teacher.float()).abs().mean(-1)


def summary_mse(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """Return the mean squared difference over the channels, in squared units of the target.

    Shapes and errors as in `summary_cosine`.
    """
    _check_summaries(student, teacher)
    return (student.float() - teacher.float()).square().mean(-1)


def summary_smooth_l1(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """Return smooth-L1 with its bend at a difference of 1, averaged over the channels.

    Shapes and errors as in `summary_cosine`.
    """
    _check_summaries(student, teacher)
    # reduction="none" keeps (b, d): the caller weights images before it averages them.
    return F.smooth_l1_loss(student.float(), teacher.float(), reduction="none", beta=1.0).mean(-1)


def summary_angle(
    student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"], *, dispersion: float
) -> Float[Tensor, " b"]:
    """Return the squared angle between summaries, divided by the teacher's angular dispersion, one value per image.

    Args:
        student: (b, d) prediction.
        teacher: (b, d) target.
        dispersion: `angular_dispersion` of the teacher, radians squared.

    Returns:
        (b,) 0 for the same direction. A constant prediction of the teacher's mean direction scores 1 on average for every
        teacher, so that teachers contribute equally.

    Raises:
        ShapeError: if the shapes differ.

    Source: C-RADIOv4, arXiv 2601.17237: L = Theta^2 / Disp. Difference: the angle is 2 atan2(|u - v|, |u + v|), whose
    gradient is finite at 0 and at pi, where that of acos is not.
    """
    _check_summaries(student, teacher)
    return angle(student.float(), teacher.float()).square() / dispersion


def angle(a: Float[Tensor, "*b d"], b: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
    """Return the angle between vectors in radians, in [0, pi], accurate for small ones too.

    A vector of zeros is at a right angle to all vectors.
    """
    # Unit vectors: |u - v| = 2 sin(angle / 2) and |u + v| = 2 cos(angle / 2).
    u, v = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    # 1e-12 keeps the gradient of the root finite where the difference or the sum is zero.
    difference, total = ((x.square().sum(-1) + 1e-12).sqrt() for x in (u - v, u + v))
    return 2 * torch.atan2(difference, total)


def angular_dispersion(summaries: Float[Tensor, "n d"]) -> float:
    """Return the mean squared angle, in radians squared, between a teacher's summaries and their mean direction.

    The result is at least 1e-4.

    Source: C-RADIOv4, arXiv 2601.17237, which gives 0.694 for SigLIP2-g and 2.120 for DINOv3-H+. The report does not
    define the computation, and this reading fits both (independent directions would give (pi / 2)^2 = 2.47).
    """
    # float64: squared angles of thousands of summaries are summed.
    unit = F.normalize(summaries.double(), dim=-1)
    return max(1e-4, float(angle(unit, unit.mean(0, keepdim=True).expand_as(unit)).square().mean()))


def spatial_match(
    student: Float[Tensor, "b n d"],
    teacher: Float[Tensor, "b n d"],
    valid: Bool[Tensor, "b n"],
    *,
    cos_weight: float,
    l1_weight: float,
) -> Float[Tensor, " b"]:
    """Return the weighted sum of cosine and smooth-L1 distance between tokens, one value per image.

    Args:
        student: (b, n, d) predictions, n = grid_h * grid_w tokens, row-major from the top left.
        teacher: (b, n, d) targets, standardised per channel (mean 0, std 1), for which the bend of smooth-L1 at 1 is meant.
        valid: (b, n) False for padding, whose values do not count but must be finite. Each image has at least one valid
            token: the reader checks this on the CPU, because a check here would wait for the device.
        cos_weight: of the cosine distance, which lies in [0, 2].
        l1_weight: of smooth-L1, averaged over the channels.

    Returns:
        (b,) 0 for a perfect match.

    Raises:
        ShapeError: if b, n or d differ.

    Source: AM-RADIO, arXiv 2312.06709, Eq. 2-3 (weights 0.9 and 0.1 there). Difference: masks padding.
    """
    _check_tokens(student, teacher, valid)
    student, teacher = student.float(), teacher.float()
    # (b, n, d) -> (b, n), both terms
    cosine = 1 - F.cosine_similarity(student, teacher, dim=-1)
    smooth_l1 = F.smooth_l1_loss(student, teacher, reduction="none", beta=1.0).mean(-1)
    return _mean_over_valid(cos_weight * cosine + l1_weight * smooth_l1, valid)


def spatial_mse(
    student: Float[Tensor, "b n d"], teacher: Float[Tensor, "b n d"], valid: Bool[Tensor, "b n"]
) -> Float[Tensor, " b"]:
    """Return the squared error between tokens, averaged over channels and valid tokens, one value per image.

    Shapes, padding and errors as in `spatial_match`. The unit is the square of the teacher's. With targets of variance 1, as
    after PHI-S, a constant prediction of the mean scores 1.

    Source: PHI-S, arXiv 2410.01680, the objective on normalised targets. Difference: masks padding.
    """
    _check_tokens(student, teacher, valid)
    # (b, n, d) -> (b, n) -> (b,)
    return _mean_over_valid((student.float() - teacher.float()).square().mean(-1), valid)


def spatial_cosine(
    student: Float[Tensor, "b n d"], teacher: Float[Tensor, "b n d"], valid: Bool[Tensor, "b n"]
) -> Float[Tensor, " b"]:
    """Return the cosine distance of tokens, averaged over valid ones. Shapes, padding and errors as in `spatial_match`."""
    _check_tokens(student, teacher, valid)
    return _mean_over_valid(1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1), valid)


def spatial_l1(
    student: Float[Tensor, "b n d"], teacher: Float[Tensor, "b n d"], valid: Bool[Tensor, "b n"]
) -> Float[Tensor, " b"]:
    """Return the mean absolute difference over channels and valid tokens, as `spatial_match` in shapes and errors."""
    _check_tokens(student, teacher, valid)
    return _mean_over_valid((student.float() - teacher.float()).abs().mean(-1), valid)


def spatial_smooth_l1(
    student: Float[Tensor, "b n d"], teacher: Float[Tensor, "b n d"], valid: Bool[Tensor, "b n"]
) -> Float[Tensor, " b"]:
    """Return mean smooth-L1 with its bend at 1 over channels and valid tokens, as `spatial_match` in shapes and errors."""
    _check_tokens(student, teacher, valid)
    return _mean_over_valid(
        F.smooth_l1_loss(student.float(), teacher.float(), reduction="none", beta=1.0).mean(-1), valid
    )


SUMMARY_LOSSES: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "cosine": summary_cosine,
    "l1": summary_l1,
    "mse": summary_mse,
    "smooth-l1": summary_smooth_l1,
}
SPATIAL_LOSSES: Final[dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "cosine": spatial_cosine,
    "l1": spatial_l1,
    "mse": spatial_mse,
    "smooth-l1": spatial_smooth_l1,
}


def align_shifted(
    student: Float[Tensor, "b n d"], shift_yx: Int[Tensor, "b 2"], grid_hw: tuple[int, int]
) -> tuple[Float[Tensor, "b n d"], Bool[Tensor, "b n"]]:
    """Move a student's tokens to the positions that they have in the teacher's crop.

    Any spatial loss over the overlap is then shift-equivariant. With the squared error it is C-RADIOv4's.

    Args:
        student: (b, h * w, d) tokens of the shifted crops.
        shift_yx: (b, 2) tokens by which the student's crop lies further down and right than the teacher's.
        grid_hw: (h, w) of both crops.

    Returns:
        (b, h * w, d) tokens, of which (i, j) is the student's (i - down, j - right), and (b, h * w) whether both crops
        contain the token. Other tokens are arbitrary.

    Raises:
        ShapeError: if tokens, shifts and grid do not fit together.

    Source: C-RADIOv4, arXiv 2601.17237. Shifts are whole patches, round(N(0, 0.5)).
    """
    h, w = grid_hw
    if student.ndim != 3 or student.shape[1] != h * w or shift_yx.shape != (len(student), 2):
        raise ShapeError(
            f"student {_listed(student)} on a grid of {h} x {w} with shifts {_listed(shift_yx)}: "
            f"they are (b, {h * w}, d) and (b, 2)."
        )
    # (h,) - (b, 1) -> (b, h): the student's row for each row of the teacher's crop; columns alike, (b, w)
    rows = torch.arange(h, device=student.device) - shift_yx[:, :1]
    columns = torch.arange(w, device=student.device) - shift_yx[:, 1:]
    # (b, h, 1) and (b, 1, w) -> (b, h, w)
    overlap = ((rows >= 0) & (rows < h))[:, :, None] & ((columns >= 0) & (columns < w))[:, None, :]
    # Clamped, so that tokens outside the overlap read some legal index; the mask leaves them out.
    indices = rows.clamp(0, h - 1)[:, :, None] * w + columns.clamp(0, w - 1)[:, None, :]
    # (b, h, w) -> (b, h * w, 1), which take_along_dim broadcasts over the d channels
    return student.take_along_dim(indices.flatten(1)[:, :, None], dim=1), overlap.flatten(1)


def resize_tokens(
    tokens: Float[Tensor, "b n d"], grid_hw: tuple[int, int], to_hw: tuple[int, int]
) -> Float[Tensor, "b m d"]:
    """Resample maps from one grid to another, bilinearly with half-pixel centres.

    Source: AM-RADIO, arXiv 2312.06709: maps of different size are compared on the larger of the two grids.
    """
    if grid_hw == to_hw:
        return tokens
    # (b, n, d) -> (b, d, h, w), and back
    maps = tokens.transpose(1, 2).unflatten(2, grid_hw)
    resized = F.interpolate(maps.float(), size=to_hw, mode="bilinear", align_corners=False)
    return resized.flatten(2).transpose(1, 2)


def _check_summaries(student: Tensor, teacher: Tensor) -> None:
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ShapeError(f"summaries differ: student {_listed(student)}, teacher {_listed(teacher)}; both are (b, d).")


def _mean_over_valid(per_token: Float[Tensor, "b n"], valid: Bool[Tensor, "b n"]) -> Float[Tensor, " b"]:
    # (b, n) -> (b,): the sum over valid tokens, divided by their number
    return per_token.masked_fill(~valid, 0).sum(1) / valid.sum(1)


def _check_tokens(student: Tensor, teacher: Tensor, valid: Tensor) -> None:
    if student.ndim != 3 or student.shape != teacher.shape or valid.shape != student.shape[:2]:
        raise ShapeError(
            f"spatial features differ: student {_listed(student)}, teacher {_listed(teacher)}, valid {_listed(valid)}; "
            f"they are (b, n, d), (b, n, d) and (b, n)."
        )


def _listed(tensor: Tensor) -> str:
    return f"({', '.join(str(size) for size in tensor.shape)})"
