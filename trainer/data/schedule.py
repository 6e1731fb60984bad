"""The schedule of forward passes: a pure function of the recipe, the step, and the number of processes.

Every group's batch is cut into slices, and each slice counts by its share of the batch. The sum over all processes therefore
does not depend on their number: one process and sixty-four minimise the same loss.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import ConfigError
from trainer.recipes.recipe import Recipe, Stage, group_shares

_DRAW_GROUPS = 3
"""Number of a random stream derived from the recipe's seed; others are in `trainer.data.crops` and `trainer.data.sampler`."""


@dataclass(frozen=True)
class BatchSlice:
    """The images of one forward and backward pass of one process within a step.

    Attributes:
        stage: number of the stage.
        group: number of the group in its stage.
        number: number of the batch, counted within the group and the stage.
        first: first image of the slice.
        last: end of the slice, exclusive.
        weight: weight of the slice's mean loss in the sum over all passes of all processes.
    """

    stage: int
    group: int
    number: int
    first: int
    last: int
    weight: float


@dataclass(frozen=True)
class StageStep:
    """A step as its stage and the number of the step within the stage."""

    stage: int
    step: int


class Schedule:
    """The passes of one process in every step of a run.

    Args:
        recipe: recipe of the run.
        world: number of processes.
        rank: number of this process.
        accumulate: passes that each process's share of a batch is cut into, to use less memory at a time.

    Raises:
        ConfigError: a batch cannot be divided among the processes; the message names the nearest size that can.
    """

    def __init__(self, recipe: Recipe, *, world: int = 1, rank: int = 0, accumulate: int = 1) -> None:
        self.recipe, self.world, self.rank, self.accumulate = recipe, world, rank, accumulate
        self._teams = [_teams(stage, world) if recipe.groups == "together" else None for stage in recipe.stages]
        # All stages are checked now, not when one begins after days.
        for number, stage in enumerate(recipe.stages):
            for member, group in enumerate(stage.groups):
                pieces = self.num_slices(number, member) * accumulate
                if group.batch_images % pieces:
                    nearest = max(1, round(group.batch_images / pieces)) * pieces
                    raise ConfigError(
                        f"stages.{number}.groups.{member}.batch_images={group.batch_images} cannot be divided by {pieces} "
                        f"({self.num_slices(number, member)} processes, {accumulate} passes each): --set stages.{number}.groups."
                        f"{member}.batch_images={nearest}"
                    )

    def stage_step(self, step: int) -> StageStep:
        """Return the stage of a step of the run. Raises ConfigError behind the last step."""
        for number, stage in enumerate(self.recipe.stages):
            if step < stage.steps:
                return StageStep(number, step)
            step -= stage.steps
        raise ConfigError(f"the run has {self.recipe.steps} steps")

    def num_slices(self, stage: int, group: int) -> int:
        """Return the number of processes that share a batch of a group."""
        teams = self._teams[stage]
        return self.world if teams is None else teams[group]

    def batch_slices(self, step: int) -> tuple[BatchSlice, ...]:
        """Return the passes of this process in a step, in order."""
        position = self.stage_step(step)
        stage, teams = self.recipe.stages[position.stage], self._teams[position.stage]
        # All processes draw the same group: the seed does not depend on the rank.
        if self.recipe.groups == "sampled" and len(stage.groups) > 1:
            group, number = self._drawn(position)
            return self._sliced(position.stage, group, number, self.rank, 1.0)
        shares = group_shares(stage)
        # A group's loss counts by its share of the rates, however many processes compute it.
        if teams is None:
            # Fewer processes than groups: every process takes a slice of every group.
            by_group = [
                self._sliced(position.stage, g, position.step, self.rank, share) for g, share in enumerate(shares)
            ]
            return tuple(itertools.chain.from_iterable(by_group))
        first = 0
        for group, size in enumerate(teams):
            if self.rank < first + size:
                return self._sliced(position.stage, group, position.step, self.rank - first, shares[group])
            first += size
        raise AssertionError("unreachable: teams add up to all processes")

    def _sliced(self, stage: int, group: int, number: int, member: int, share: float) -> tuple[BatchSlice, ...]:
        images = self.recipe.stages[stage].groups[group].batch_images
        # A process's passes lie side by side, so that it reads neighbouring images.
        pieces = self.num_slices(stage, group) * self.accumulate
        size = images // pieces
        start = member * size * self.accumulate
        firsts = range(start, start + size * self.accumulate, size)
        return tuple(BatchSlice(stage, group, number, first, first + size, share / pieces) for first in firsts)

    def _drawn(self, position: StageStep) -> tuple[int, int]:
        draws, before = self._draws(position.stage)
        return int(draws[position.step]), int(before[position.step])

    @functools.cache  # noqa: B019  # a schedule lives as long as the run
    def _draws(self, stage: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the group of each step of a stage (steps,), and the number of batches of that group before it (steps,)."""
        settings = self.recipe.stages[stage]
        rng = np.random.default_rng((self.recipe.seed, _DRAW_GROUPS, stage))
        draws = rng.choice(len(settings.groups), settings.steps, p=group_shares(settings))
        before = np.empty(settings.steps, np.int64)
        for group in range(len(settings.groups)):
            in_group = draws == group
            before[in_group] = np.arange(np.count_nonzero(in_group))
        return draws, before


def _teams(stage: Stage, world: int) -> list[int] | None:
    """Return the number of processes for each group, by the rates and at least one; None if every process serves all groups.

    Whole processes for a group cut its batch into the fewest slices.
    """
    if len(stage.groups) == 1 or world < len(stage.groups):
        return None
    exact = [share * world for share in group_shares(stage)]
    teams = [max(1, math.floor(size)) for size in exact]
    # One process at a time moves to the group with the largest rounding error, until all are assigned.
    while sum(teams) != world:
        short = [size - team for size, team in zip(exact, teams, strict=True)]
        if sum(teams) < world:
            teams[short.index(max(short))] += 1
        else:
            spare = [value if team > 1 else math.inf for value, team in zip(short, teams, strict=True)]
            teams[spare.index(min(spare))] -= 1
    return teams
