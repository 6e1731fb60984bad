from dataclasses import replace
from pathlib import Path

import pytest
import torch

from radio_cache.errors import ConfigError
from radio_cache.reader import Cache
from radio_cache.testing import make_tiny_cache, write_images
from trainer.distributed.processes import Processes
from trainer.loop import train
from trainer.model.files import load_student
from trainer.model.mosaic import make_mosaics, split_mosaics
from trainer.recipes.recipe import Recipe, override_stages
from trainer.run.step import TrainingRun
from trainer.students.base import StudentOutput
from trainer.train_config import TrainConfig


def with_mosaic(recipe: Recipe, *, image_px: int = 64, batch_images: int = 4) -> Recipe:
    [stage] = recipe.stages
    [group] = stage.groups
    group = replace(group, image_px=image_px, batch_images=batch_images, mosaic=2)
    return replace(recipe, stages=(replace(stage, groups=(group,), steps=4),))


def test_images_lie_row_by_row_and_are_cut_where_they_were_joined() -> None:
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 4, 6)
    mosaics = make_mosaics(images, 2)
    assert mosaics.shape == (2, 3, 8, 12)
    assert mosaics[1, 0, ::4, ::6].tolist() == [[4, 5], [6, 7]]
    # A student whose tokens are 2 x 2 pixels of the first channel.
    tokens = mosaics[:, :1, ::2, ::2].flatten(2).transpose(1, 2)
    said = split_mosaics(StudentOutput(torch.tensor([[10.0], [20.0]]), tokens), (2, 3), 2)
    assert said.spatial.shape == (8, 6, 1)
    assert said.spatial[:, :, 0].tolist() == [[float(number)] * 6 for number in range(8)]
    assert said.summary[:, 0].tolist() == [10.0] * 4 + [20.0] * 4


def test_tokens_of_a_ramp_stay_in_order() -> None:
    ramp = torch.arange(4 * 2 * 3.0).view(4, 1, 2, 3).expand(4, 3, 2, 3)
    tokens = make_mosaics(ramp, 2)[:, :1].flatten(2).transpose(1, 2)
    assert torch.equal(
        split_mosaics(StudentOutput(torch.zeros(1, 1), tokens), (2, 3), 2).spatial[..., 0], ramp[:, 0].flatten(1)
    )


def test_a_mosaic_of_a_student_that_sees_one_token_at_a_time_has_the_loss_of_its_images(
    tmp_path: Path, tiny_recipe: Recipe
) -> None:
    write_images(tmp_path / "images")
    cache = make_tiny_cache(tmp_path / "c.zarr", tmp_path / "images")
    overrides = {
        "width": 8,
        "depth": 1,
        "heads": 2,
        "max_resolution": 64,
        "position_drop": 0.0,
        "num_summary_tokens": 1,
    }
    alone = replace(override_stages(tiny_recipe, batch_images=4), student="vit-tiny-16", student_overrides=overrides)
    spatial: list[float] = []
    for recipe in (with_mosaic(alone), alone):
        run = TrainingRun(TrainConfig(cache=cache.path, recipe=recipe, out=tmp_path / "run"), Processes())
        for name, parameter in run.model.student.named_parameters():
            if name.endswith("table") or ".proj." in name or ".mlp.2." in name:  # no place, no attention, no MLP
                torch.nn.init.zeros_(parameter)
        with run.loader(0) as loader:
            parts = run.step(0, iter(loader))[0].teachers["fake-a"]
        assert ("summary" in parts) == (recipe is alone)
        spatial.append(parts["spatial"])
    assert spatial[0] == pytest.approx(spatial[1], rel=1e-5)


def test_a_run_with_mosaics_ends_with_a_student_of_the_whole_size(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = replace(with_mosaic(tiny_recipe), knn_every=2, picture_every=2, balancing="amtml-kd")
    train(TrainConfig(cache=tiny_cache.path, recipe=recipe, out=tmp_path / "run"))
    assert (tmp_path / "run/pictures/step-00000004.png").exists()
    assert load_student(tmp_path / "run").config.image_hw == (64, 64)


@pytest.mark.parametrize(
    ("image_px", "images", "cure"),
    [
        (96, 4, r"crops of (32|64) as the nearest; --set stages\.0\.groups\.0\.image_px=(64|128)"),
        (64, 6, r"mosaics of 4 images in 1 passes take multiples of 4: --set stages\.0\.groups\.0\.batch_images=8"),
    ],
)
def test_what_cannot_be_a_mosaic_is_answered_with_what_can(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path, image_px: int, images: int, cure: str
) -> None:
    recipe = with_mosaic(tiny_recipe, image_px=image_px, batch_images=images)
    with pytest.raises(ConfigError, match=cure):
        train(TrainConfig(cache=tiny_cache.path, recipe=recipe, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
