from dataclasses import replace

import pytest

from radio_cache.errors import ConfigError
from trainer.data.schedule import Schedule
from trainer.recipes.recipe import Group, Recipe, Stage


@pytest.fixture
def two_groups(tiny_recipe: Recipe) -> Recipe:
    """Steps of 12 images for one group and 6 for the other, which counts a third."""
    groups = (Group(image_px=32, batch_images=12, rate=2.0), Group(image_px=64, batch_images=6, rate=1.0))
    return replace(tiny_recipe, stages=(Stage(name="both", steps=600, lr=1.0, warmup_steps=0, groups=groups),))


@pytest.mark.parametrize("world", [1, 2, 3, 6])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_image_of_a_step_counts_alike_whatever_the_processes(
    two_groups: Recipe, world: int, accumulate: int
) -> None:
    groups = tuple(replace(group, batch_images=24) for group in two_groups.stages[0].groups)
    recipe = replace(two_groups, stages=(replace(two_groups.stages[0], groups=groups),))
    weights: dict[tuple[int, int], float] = {}
    for rank in range(world):
        for part in Schedule(recipe, world=world, rank=rank, accumulate=accumulate).batch_slices(5):
            assert (part.stage, part.number) == (0, 5)
            for place in range(part.first, part.last):
                assert (part.group, place) not in weights
                weights[part.group, place] = part.weight / (part.last - part.first)
    assert weights.keys() == {(group, place) for group in (0, 1) for place in range(24)}
    for (group, _), weight in weights.items():
        assert weight == pytest.approx((2 / 3, 1 / 3)[group] / 24)


def test_processes_are_divided_among_groups_by_their_rates(two_groups: Recipe) -> None:
    teams = [{part.group for part in Schedule(two_groups, world=3, rank=rank).batch_slices(0)} for rank in range(3)]
    assert teams == [{0}, {0}, {1}]


def test_sampled_groups_come_at_their_rates_and_go_through_their_batches_in_order(two_groups: Recipe) -> None:
    recipe = replace(two_groups, groups="sampled")
    schedule = Schedule(recipe, world=2, rank=1)
    parts = [part for step in range(600) for part in schedule.batch_slices(step)]
    assert len(parts) == 600
    assert 350 < sum(part.group == 0 for part in parts) < 450
    for group, images in ((0, 12), (1, 6)):
        mine = [part for part in parts if part.group == group]
        assert [part.number for part in mine] == list(range(len(mine)))
        assert {(part.first, part.last, part.weight) for part in mine} == {(images // 2, images, 0.5)}
    assert [p.group for p in parts] == [
        part.group for step in range(600) for part in Schedule(recipe).batch_slices(step)
    ]


def test_a_batch_that_cannot_be_divided_names_the_nearest_that_can(two_groups: Recipe) -> None:
    with pytest.raises(ConfigError, match=r"groups\.0\.batch_images=12 cannot be divided by 10 .*batch_images=10"):
        Schedule(two_groups, world=8, accumulate=2)


def test_steps_count_anew_in_every_stage(two_groups: Recipe) -> None:
    recipe = replace(two_groups, stages=(replace(two_groups.stages[0], steps=3), two_groups.stages[0]))
    schedule = Schedule(recipe)
    assert [(schedule.stage_step(step).stage, schedule.stage_step(step).step) for step in (0, 2, 3, 4)] == [
        (0, 0),
        (0, 2),
        (1, 0),
        (1, 1),
    ]
    with pytest.raises(ConfigError, match="the run has 603 steps"):
        schedule.stage_step(603)
