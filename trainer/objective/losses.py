"""Distances between what a student says of a teacher and what the teacher says, one value per image.

Weighting teachers, reducing over the batch and logging are the trainer's. Everything is computed in float32.
Source of the objective: AM-RADIO, arXiv 2312.06709, Eq. 1-3; of the squared error: PHI-S, arXiv 2410.01680; of the angle
and of shifted crops: C-RADIOv4, arXiv 2601.17237. `SUMMARY_LOSSES` and `SPATIAL_LOSSES` name those that need no more than
two features and a mask.
"""

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from radio_cache.errors import ShapeError


def summary_cosine(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """Cosine distance between summaries, one value per image.

    Shapes: b images; d = teacher width.
    Units: none; 0 is the same direction, 1 a right angle, 2 the opposite direction. Lengths do not matter.
    Raises: ShapeError, with both shapes, if they differ.
    Source: AM-RADIO, arXiv 2312.06709, Eq. 1.
    """
    _check_summaries(student, teacher)
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)


def summary_l1(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """Mean absolute difference over the channels, in the target's units. Shapes and errors as in `summary_cosine`.

    Source: AM-RADIO, arXiv 2312.06709, where it did worse than the cosine, as the next two did.
    """
    _check_summaries(student, teacher)
    return (student.float() - teacher.float()).abs().mean(-1)


def summary_mse(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """Mean squared difference over the channels, in the target's units squared. Shapes and errors as in `summary_cosine`."""
    _check_summaries(student, teacher)
    return (student.float() - teacher.float()).square().mean(-1)


def summary_smooth_l1(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """Smooth-L1 with its bend at a difference of 1, mean over the channels. Shapes and errors as in `summary_cosine`."""
    _check_summaries(student, teacher)
    return F.smooth_l1_loss(student.float(), teacher.float(), reduction="none", beta=1.0).mean(-1)


def summary_angle(
    student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"], *, dispersion: float
) -> Float[Tensor, " b"]:
    """The squared angle between summaries over the teacher's own angular dispersion, one value per image.

    Shapes and errors: as in `summary_cosine`.
    Units: none; radians squared over radians squared (`angular_dispersion`). 0 is the same direction; always answering the
        teacher's mean direction scores 1 on average, whichever the teacher, so that teachers weigh alike.
    Source: C-RADIOv4, arXiv 2601.17237: L = Theta^2 / Disp. Differs: the angle is atan2 of |u - v| and |u + v|, twice, whose
        gradient is finite at 0 and at pi, where that of acos is not.
    """
    _check_summaries(student, teacher)
    return angle(student.float(), teacher.float()).square() / dispersion


def angle(a: Float[Tensor, "*b d"], b: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
    """Angle between vectors in radians, in [0, pi], exact for small ones. A vector of zeros stands at a right angle to all."""
    u, v = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    # The tiny number keeps the gradient of the root finite where the difference or the sum is zero.
    apart, together = ((x.square().sum(-1) + 1e-12).sqrt() for x in (u - v, u + v))
    return 2 * torch.atan2(apart, together)


def angular_dispersion(summaries: Float[Tensor, "n d"]) -> float:
    """Mean squared angle, in radians squared, of a teacher's summaries from their mean direction; at least 1e-4.

    Source: C-RADIOv4, arXiv 2601.17237, which gives 0.694 for SigLIP2-g and 2.120 for DINOv3-H+; how it was computed is not
    said there, and this reading fits both (independent directions would give (pi / 2)^2 = 2.47).
    """
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


def spatial_cosine(
    student: Float[Tensor, "b n d"], teacher: Float[Tensor, "b n d"], valid: Bool[Tensor, "b n"]
) -> Float[Tensor, " b"]:
    """Cosine distance between tokens, averaged over valid tokens. Shapes, padding and errors as in `spatial_match`."""
    _check_tokens(student, teacher, valid)
    return _mean_over_valid(1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1), valid)


def spatial_l1(
    student: Float[Tensor, "b n d"], teacher: Float[Tensor, "b n d"], valid: Bool[Tensor, "b n"]
) -> Float[Tensor, " b"]:
    """Mean absolute difference over channels and valid tokens. Shapes, padding and errors as in `spatial_match`."""
    _check_tokens(student, teacher, valid)
    return _mean_over_valid((student.float() - teacher.float()).abs().mean(-1), valid)


def spatial_smooth_l1(
    student: Float[Tensor, "b n d"], teacher: Float[Tensor, "b n d"], valid: Bool[Tensor, "b n"]
) -> Float[Tensor, " b"]:
    """Smooth-L1 with its bend at 1, over channels and valid tokens. Shapes, padding and errors as in `spatial_match`."""
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
    """A student's tokens moved to where the teacher's crop has them, and which of them both crops show.

    shift_yx: how many tokens further down and right the student's crop lies than the teacher's. Token (i, j) of the
    result is the student's (i - down, j - right); where the student's crop does not reach, some token and False.
    Any spatial loss over the overlap is then shift-equivariant; with the squared error it is C-RADIOv4's.
    Source: C-RADIOv4, arXiv 2601.17237; shifts are whole patches, round(N(0, 0.5)).
    """
    h, w = grid_hw
    if student.ndim != 3 or student.shape[1] != h * w or shift_yx.shape != (len(student), 2):
        raise ShapeError(
            f"student {_listed(student)} on a grid of {h} x {w} with shifts {_listed(shift_yx)}: "
            f"they are (b, {h * w}, d) and (b, 2)."
        )
    rows = torch.arange(h, device=student.device) - shift_yx[:, :1]
    columns = torch.arange(w, device=student.device) - shift_yx[:, 1:]
    shown = ((rows >= 0) & (rows < h))[:, :, None] & ((columns >= 0) & (columns < w))[:, None, :]
    places = rows.clamp(0, h - 1)[:, :, None] * w + columns.clamp(0, w - 1)[:, None, :]
    return student.take_along_dim(places.flatten(1)[:, :, None], dim=1), shown.flatten(1)


def resize_tokens(
    tokens: Float[Tensor, "b n d"], grid_hw: tuple[int, int], to_hw: tuple[int, int]
) -> Float[Tensor, "b m d"]:
    """A map on one grid, bilinearly on another with half-pixel centres; the same tensor where they are equal.

    Source: AM-RADIO, arXiv 2312.06709: maps of different size meet on the larger of the two.
    """
    if grid_hw == to_hw:
        return tokens
    maps = tokens.transpose(1, 2).unflatten(2, grid_hw)
    resized = F.interpolate(maps.float(), size=to_hw, mode="bilinear", align_corners=False)
    return resized.flatten(2).transpose(1, 2)


def _check_summaries(student: Tensor, teacher: Tensor) -> None:
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ShapeError(f"summaries differ: student {_listed(student)}, teacher {_listed(teacher)}; both are (b, d).")


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
