"""The objective of a run: the losses that the recipe names, for every teacher, weighted and balanced."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.batch import Targets
from trainer.model.adaptors import AdaptorOutput
from trainer.objective.balancing import BALANCINGS, Balancing, Terms
from trainer.objective.losses import (
    SPATIAL_LOSSES,
    SUMMARY_LOSSES,
    align_shifted,
    resize_tokens,
    spatial_match,
    summary_angle,
)
from trainer.recipes.recipe import Recipe


class TeacherLoss(NamedTuple):
    """One teacher's losses of a batch.

    Attributes:
        summary: (b,) losses by image; None for a teacher without a summary.
        spatial: (b,) losses by image.
        coverage: (b,) share of the view inside the crop, divided by its average over the run. Summary losses are weighted by
            it, since a summary describes the whole view. The average is over the run, so that a batch may be split.
    """

    summary: Float[Tensor, " b"] | None
    spatial: Float[Tensor, " b"]
    coverage: Float[Tensor, " b"]

    def means(self) -> dict[str, Tensor]:
        """Return the batch's mean losses: "spatial", and "summary" if the teacher has one."""
        return {part: losses.mean() for part, losses in self.per_image().items()}

    def detached(self) -> "TeacherLoss":
        """Return the values without their graph, so that its memory is freed."""
        return TeacherLoss(
            None if self.summary is None else self.summary.detach(), self.spatial.detach(), self.coverage
        )

    def is_finite(self) -> NDArray[np.bool_]:
        """Return (b,) whether all losses of an image are finite. Waits for the device."""
        # (parts, b) -> (b,)
        return torch.stack(list(self.per_image().values())).isfinite().all(0).cpu().numpy()

    def per_image(self) -> dict[str, Float[Tensor, " b"]]:
        """Return the contribution of each image, (b,) for each part; the mean over images is that of `means`."""
        losses = {"spatial": self.spatial}
        if self.summary is not None:
            losses["summary"] = self.summary * self.coverage
        return losses


def teacher_loss(
    prediction: AdaptorOutput, target: Targets, recipe: Recipe, student_hw: tuple[int, int]
) -> TeacherLoss:
    """Return one teacher's losses, by default those of AM-RADIO (arXiv 2312.06709, Eq. 1-3).

    Args:
        prediction: of the student's head for this teacher.
        target: of the teacher.
        recipe: names the losses and their weights.
        student_hw: grid of the prediction.
    """
    tokens, valid = prediction.spatial, target.valid
    if target.shift_yx is not None:
        tokens, overlap = align_shifted(tokens, target.shift_yx, student_hw)
        if student_hw != target.grid_hw:
            # A token of the finer grid counts if all tokens that it is interpolated from lie in the overlap.
            # (b, n) -> (b, n, 1) -> (b, m, 1) -> (b, m)
            overlap_share = resize_tokens(overlap.float()[..., None], student_hw, target.grid_hw)[..., 0]
            overlap = overlap_share > 1 - 1e-3
        # Both are (b, m) on the teacher's grid here: padding of the teacher, and tokens outside the student's crop.
        valid = valid & overlap
    # (b, n, d) -> (b, m, d): targets stay on their own grid, predictions are brought to it.
    tokens = resize_tokens(tokens, student_hw, target.grid_hw)
    if recipe.spatial_loss == "match":
        spatial = spatial_match(tokens, target.spatial, valid, cos_weight=recipe.cos_weight, l1_weight=recipe.l1_weight)
    else:
        spatial = SPATIAL_LOSSES[recipe.spatial_loss](tokens, target.spatial, valid)
    if prediction.summary is None or target.summary is None:
        return TeacherLoss(None, spatial, target.coverage)
    if recipe.summary_loss == "angle":
        # A run with this loss fits the dispersion of every teacher that has summaries (`TargetStatistics.fit`).
        assert target.dispersion is not None
        summary = summary_angle(prediction.summary, target.summary, dispersion=target.dispersion)
    else:
        summary = SUMMARY_LOSSES[recipe.summary_loss](prediction.summary, target.summary)
    return TeacherLoss(summary, spatial, target.coverage)


class Objective:
    """The scalar of a step.

    Attributes:
        terms: (teacher, part) of the whole run. The state of the balancing is in this order.
        balancing: of the recipe.
    """

    def __init__(self, teachers: dict[str, bool], summary_dim: int, recipe: Recipe) -> None:
        """Create the objective of a run.

        Args:
            teachers: name -> whether the teacher has a summary.
            summary_dim: width of the student's summary.
            recipe: names weights and balancing.
        """
        self._recipe = recipe
        self.terms = tuple(
            (name, part)
            for name, has_summary in teachers.items()
            for part in (("spatial", "summary") if has_summary else ("spatial",))
        )
        self.balancing: Balancing = BALANCINGS[recipe.balancing](len(self.terms), summary_dim)

    def __call__(self, losses: dict[str, TeacherLoss], summary: Float[Tensor, "b s"]) -> Tensor:
        """Return the scalar to minimise.

        Args:
            losses: of the teachers of this step, by name.
            summary: (b, s) of the student, for balancings that depend on it.
        """
        # () and (b,) for each teacher and part
        means = {name: loss.means() for name, loss in losses.items()}
        images = {name: loss.per_image() for name, loss in losses.items()}
        # A step may train on some of the teachers only. Learnt weights are found by a term's index in the whole run.
        present = tuple(number for number, (name, part) in enumerate(self.terms) if part in means.get(name, ()))
        named = [self.terms[number] for number in present]
        weights = [self.weight(name, part) for name, part in named]
        return self.balancing(
            Terms(
                # (t,), then (t, b)
                torch.stack([weight * means[name][part] for weight, (name, part) in zip(weights, named, strict=True)]),
                torch.stack([weight * images[name][part] for weight, (name, part) in zip(weights, named, strict=True)]),
                summary,
                present,
            )
        )

    def weight(self, teacher: str, part: str) -> float:
        """Return the recipe's weight of one term: the teacher's, times that of its part."""
        recipe = self._recipe
        weight = recipe.teacher_weights.get(teacher, 1.0)
        if part == "spatial":
            return weight * recipe.spatial_weight
        return weight * recipe.summary_weight * recipe.teacher_summary_weights.get(teacher, 1.0)
