"""What each process does in each step: a pure function of the recipe, the step, and how many processes there are.

Together, the processes do the same whatever their number: every group's batch is cut into slices, and each slice counts by
its share of the batch. So one process and sixty-four minimise the same sum.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import ConfigError
from trainer.recipes.recipe import Recipe, Stage, group_shares

_DRAW_GROUPS = 3
"""A stream of random numbers drawn from the recipe's seed; the others are in `trainer.data.crops` and `trainer.data.sampler`."""


@dataclass(frozen=True)
class BatchSlice:
    """A forward and backward pass of one process within a step.

    stage, group: which. number: how many batches of this group came before in its stage. first, last: the images of the
    batch, [first, last), that this pass takes. weight: of its mean loss in the sum over all passes of all processes.
    """

    stage: int
    group: int
    number: int
    first: int
    last: int
    weight: float


@dataclass(frozen=True)
class StageStep:
    """Where in the run a step lies: the stage, and how many steps of it came before."""

    stage: int
    step: int


class Schedule:
    """accumulate: passes that each slice of a batch is cut into, so that less is in memory at a time.

    Raises ConfigError for a batch that cannot be divided among the processes, naming the nearest that can.
    """

    def __init__(self, recipe: Recipe, *, world: int = 1, rank: int = 0, accumulate: int = 1) -> None:
        self.recipe, self.world, self.rank, self.accumulate = recipe, world, rank, accumulate
        self._teams = [_teams(stage, world) if recipe.groups == "together" else None for stage in recipe.stages]
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
        for number, stage in enumerate(self.recipe.stages):
            if step < stage.steps:
                return StageStep(number, step)
            step -= stage.steps
        raise ConfigError(f"the run has {self.recipe.steps} steps")

    def num_slices(self, stage: int, group: int) -> int:
        """How many processes share a batch of a group."""
        teams = self._teams[stage]
        return self.world if teams is None else teams[group]

    def batch_slices(self, step: int) -> tuple[BatchSlice, ...]:
        """The passes of this process, in order."""
        place = self.stage_step(step)
        stage, teams = self.recipe.stages[place.stage], self._teams[place.stage]
        if self.recipe.groups == "sampled" and len(stage.groups) > 1:
            group, number = self._drawn(place)
            return self._sliced(place.stage, group, number, self.rank, 1.0)
        shares = group_shares(stage)
        if teams is None:
            passes = [self._sliced(place.stage, g, place.step, self.rank, share) for g, share in enumerate(shares)]
            return tuple(part for some in passes for part in some)
        first = 0
        for group, size in enumerate(teams):
            if self.rank < first + size:
                return self._sliced(place.stage, group, place.step, self.rank - first, shares[group])
            first += size
        raise AssertionError("every process is in a team")

    def _sliced(self, stage: int, group: int, number: int, member: int, share: float) -> tuple[BatchSlice, ...]:
        images = self.recipe.stages[stage].groups[group].batch_images
        pieces = self.num_slices(stage, group) * self.accumulate
        size = images // pieces
        start = member * size * self.accumulate
        firsts = range(start, start + size * self.accumulate, size)
        return tuple(BatchSlice(stage, group, number, first, first + size, share / pieces) for first in firsts)

    def _drawn(self, place: StageStep) -> tuple[int, int]:
        draws, before = self._draws(place.stage)
        return int(draws[place.step]), int(before[place.step])

    @functools.cache  # noqa: B019  # a plan lives as long as the run
    def _draws(self, stage: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(steps,) the group of each step of a stage, and how many batches of it came before."""
        settings = self.recipe.stages[stage]
        rng = np.random.default_rng((self.recipe.seed, _DRAW_GROUPS, stage))
        draws = rng.choice(len(settings.groups), settings.steps, p=group_shares(settings))
        before = np.empty(settings.steps, np.int64)
        for group in range(len(settings.groups)):
            mine = draws == group
            before[mine] = np.arange(np.count_nonzero(mine))
        return draws, before


def _teams(stage: Stage, world: int) -> list[int] | None:
    """Processes for each group, by the rates and at least one each; None where there are fewer processes than groups.

    One process per group or more is the fewest partitions a batch can have.
    """
    if len(stage.groups) == 1 or world < len(stage.groups):
        return None
    wanted = [share * world for share in group_shares(stage)]
    teams = [max(1, math.floor(want)) for want in wanted]
    while sum(teams) != world:
        short = [want - team for want, team in zip(wanted, teams, strict=True)]
        if sum(teams) < world:
            teams[short.index(max(short))] += 1
        else:
            spare = [value if team > 1 else math.inf for value, team in zip(short, teams, strict=True)]
            teams[spare.index(min(spare))] -= 1
    return teams
