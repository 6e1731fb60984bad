"""The objective: weights, masks and resizing between a student's guess and the losses of a step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from radio_cache.testing import make_tiny_cache, write_images
from trainer.data.batch import Targets
from trainer.loop import train
from trainer.model.adaptors import AdaptorOutput
from trainer.objective.balancing import BALANCINGS
from trainer.objective.losses import SPATIAL_LOSSES, SUMMARY_LOSSES
from trainer.objective.objective import Objective, TeacherLoss, teacher_loss
from trainer.recipes.recipe import Recipe, override_stages
from trainer.train_config import TrainConfig


def loss_of(spatial: list[float], summary: list[float] | None = None, kept: list[float] | None = None) -> TeacherLoss:
    return TeacherLoss(
        None if summary is None else torch.tensor(summary),
        torch.tensor(spatial),
        torch.tensor(kept or [1.0] * len(spatial)),
    )


def test_summaries_count_by_what_the_crop_kept() -> None:
    loss = loss_of([1.0, 3.0], summary=[1.0, 2.0], kept=[1.5, 0.5])
    assert loss.means()["summary"].item() == pytest.approx(1.25)
    assert loss.means()["spatial"].item() == 2.0
    assert loss.per_image()["summary"].mean().item() == pytest.approx(1.25)


def test_the_total_is_weighted_by_teacher_and_by_kind(tiny_recipe: Recipe) -> None:
    recipe = replace(
        tiny_recipe,
        teacher_weights={"a": 2.0},
        teacher_summary_weights={"a": 0.5, "b": 0.0},
        summary_weight=3.0,
        spatial_weight=10.0,
    )
    objective = Objective({"a": True, "b": True, "c": False}, 4, recipe)
    losses = {"a": loss_of([1.0], [0.5]), "b": loss_of([2.0], [100.0]), "c": loss_of([3.0])}
    total = objective(losses, torch.zeros(1, 4))
    assert total.item() == pytest.approx(2 * 10 * 1 + 2 * 3 * 0.5 * 0.5 + 10 * 2 + 0 + 10 * 3)


def test_a_step_may_ask_only_some_of_the_teachers(tiny_recipe: Recipe) -> None:
    objective = Objective({"a": True, "b": True}, 4, replace(tiny_recipe, balancing="adaloss"))
    objective({"b": loss_of([2.0], [0.5])}, torch.zeros(1, 4))
    assert objective.balancing.state_dict()["running"].tolist() == pytest.approx([0, 0, 2.0, 0.5])


def test_the_student_is_resized_to_a_larger_target(tiny_recipe: Recipe) -> None:
    recipe = replace(tiny_recipe, spatial_loss="l1")
    ramp = torch.tensor([[0.0], [1.0]])
    target = Targets(
        torch.tensor([[[0.0], [0.25], [0.75], [1.0]]]), torch.ones(1, 4).bool(), None, torch.ones(1), (1, 4)
    )
    assert teacher_loss(AdaptorOutput(None, ramp[None]), target, recipe, (1, 2)).spatial.item() == 0


def test_a_shift_is_undone_before_the_loss_and_what_is_outside_does_not_count(tiny_recipe: Recipe) -> None:
    recipe = replace(tiny_recipe, spatial_loss="mse")
    target = Targets(
        torch.tensor([[[0.0], [1.0], [2.0]]]),
        torch.ones(1, 3).bool(),
        None,
        torch.ones(1),
        (1, 3),
        shift_yx=torch.tensor([[0, 1]]),
    )
    guess = AdaptorOutput(None, torch.tensor([[[1.0], [2.0], [99.0]]]))
    assert teacher_loss(guess, target, recipe, (1, 3)).spatial.item() == 0
    unshifted = replace(target, shift_yx=None)
    assert teacher_loss(guess, unshifted, recipe, (1, 3)).spatial.item() > 1


@pytest.mark.parametrize(
    "settings",
    [
        *({"spatial_loss": name} for name in SPATIAL_LOSSES),
        *({"summary_loss": name} for name in (*SUMMARY_LOSSES, "angle")),
        *({"balancing": name} for name in BALANCINGS),
        {"normalise": "phi-s", "normalise_summary": "none", "spatial_loss": "mse", "summary_loss": "angle"},
        {"normalise": "global", "shift_tokens": 0.5, "target_grid": "larger", "spatial_loss": "mse"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_every_name_trains_and_resumes_bitwise(
    tiny_recipe: Recipe, tmp_path: Path, settings: dict[str, object]
) -> None:
    """Three steps, then the last one again from the checkpoint before it: the same student, the same balancing."""
    write_images(tmp_path / "images")
    widths = {"a": (4, 8), "b": (None, 4)}
    cache = make_tiny_cache(tmp_path / "cache.zarr", tmp_path / "images", teachers=widths)
    recipe = Recipe.from_json(
        {
            **replace(
                override_stages(tiny_recipe, steps=3), student="vit-tiny-16", log_every=1, checkpoint_every=1
            ).to_json(),
            **settings,
        }
    )
    config = TrainConfig(cache=cache.path, recipe=recipe, out=tmp_path / "run")
    train(config)
    last = tmp_path / "run/checkpoints/step-00000003.pt"
    weights, state = (tmp_path / "run/student.safetensors").read_bytes(), torch.load(last, weights_only=True)
    last.unlink()
    report = train(config)
    assert (report.steps_before, report.steps) == (2, 3)
    assert (tmp_path / "run/student.safetensors").read_bytes() == weights
    again = torch.load(last, weights_only=True)
    assert all(torch.equal(again["balancing"][key], state["balancing"][key]) for key in state["balancing"])
