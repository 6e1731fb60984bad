"""What a run minimises: the losses of every teacher by the names in the recipe, weighted and balanced."""

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
    """One teacher's losses by image (b,); summary is None where the teacher has none.

    kept (b,): the share of the view that an image's crop kept, over what is kept on average. Its summary loss counts by it,
    since a summary speaks of the whole view. The average is over the run and not the batch, so that a batch may be cut.
    """

    summary: Float[Tensor, " b"] | None
    spatial: Float[Tensor, " b"]
    kept: Float[Tensor, " b"]

    def means(self) -> dict[str, Tensor]:
        """The batch's losses: "spatial", and "summary" where there is one."""
        found = {"spatial": self.spatial.mean()}
        if self.summary is not None:
            found["summary"] = (self.summary * self.kept).mean()
        return found

    def detached(self) -> "TeacherLoss":
        """The same values, which keep nothing of how they were computed."""
        return TeacherLoss(None if self.summary is None else self.summary.detach(), self.spatial.detach(), self.kept)

    def is_finite(self) -> NDArray[np.bool_]:
        """Of each image (b,), whether all its losses are. Waits for the device."""
        return torch.stack(list(self.per_image().values())).isfinite().all(0).cpu().numpy()

    def per_image(self) -> dict[str, Float[Tensor, " b"]]:
        """What each image adds; the mean of it is that of `means`, up to rounding."""
        found = {"spatial": self.spatial}
        if self.summary is not None:
            found["summary"] = self.summary * self.kept
        return found


def teacher_loss(guess: AdaptorOutput, target: Targets, recipe: Recipe, student_hw: tuple[int, int]) -> TeacherLoss:
    """A teacher's losses (AM-RADIO, arXiv 2312.06709, Eq. 1-3, or what the recipe names). student_hw: the guess's grid."""
    said, valid = guess.spatial, target.valid
    if target.shift_yx is not None:
        said, overlap = align_shifted(said, target.shift_yx, student_hw)
        if student_hw != target.grid_hw:
            # A token on the finer grid counts where all it was made of lies in the overlap.
            seen = resize_tokens(overlap.float()[..., None], student_hw, target.grid_hw)[..., 0]
            overlap = seen > 1 - 1e-3
        valid = valid & overlap
    said = resize_tokens(said, student_hw, target.grid_hw)
    if recipe.spatial_loss == "match":
        spatial = spatial_match(said, target.spatial, valid, cos_weight=recipe.cos_weight, l1_weight=recipe.l1_weight)
    else:
        spatial = SPATIAL_LOSSES[recipe.spatial_loss](said, target.spatial, valid)
    if guess.summary is None or target.summary is None:
        return TeacherLoss(None, spatial, target.coverage)
    if recipe.summary_loss == "angle":
        assert target.dispersion is not None
        summary = summary_angle(guess.summary, target.summary, dispersion=target.dispersion)
    else:
        summary = SUMMARY_LOSSES[recipe.summary_loss](guess.summary, target.summary)
    return TeacherLoss(summary, spatial, target.coverage)


class Objective:
    """The scalar of a step. terms: (teacher, part) of the whole run, in order; the balancing's state goes by this order."""

    def __init__(self, teachers: dict[str, bool], summary_dim: int, recipe: Recipe) -> None:
        """teachers: name -> whether it has a summary. summary_dim: of the student."""
        self._recipe = recipe
        self.terms = tuple(
            (name, part)
            for name, has_summary in teachers.items()
            for part in (("spatial", "summary") if has_summary else ("spatial",))
        )
        self.balancing: Balancing = BALANCINGS[recipe.balancing](len(self.terms), summary_dim)

    def __call__(self, losses: dict[str, TeacherLoss], summary: Float[Tensor, "b s"]) -> Tensor:
        """losses: of the teachers of this step. summary: the student's own, for balancings that look at it."""
        means = {name: loss.means() for name, loss in losses.items()}
        images = {name: loss.per_image() for name, loss in losses.items()}
        present = tuple(number for number, (name, part) in enumerate(self.terms) if part in means.get(name, ()))
        named = [self.terms[number] for number in present]
        weights = [self.weight(name, part) for name, part in named]
        return self.balancing(
            Terms(
                torch.stack([weight * means[name][part] for weight, (name, part) in zip(weights, named, strict=True)]),
                torch.stack([weight * images[name][part] for weight, (name, part) in zip(weights, named, strict=True)]),
                summary,
                present,
            )
        )

    def weight(self, teacher: str, part: str) -> float:
        """The recipe's weight of one term: the teacher's times that of all its kind."""
        recipe = self._recipe
        weight = recipe.teacher_weights.get(teacher, 1.0)
        if part == "spatial":
            return weight * recipe.spatial_weight
        return weight * recipe.summary_weight * recipe.teacher_summary_weights.get(teacher, 1.0)
