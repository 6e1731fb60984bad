"""How much of a photo a finished student is shown: what its teachers saw, wherever a whole photo is shown to it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from transformers import CLIPImageProcessor

from evals.encoders import StudentEncoder
from radio_cache.errors import ConfigError
from radio_cache.geometry.crops import Fit, ViewGeometry, patch_geometry, visible_box_xyxy
from radio_cache.reader import Cache
from radio_cache.testing import make_tiny_cache, write_images
from trainer.cli import main as train_main
from trainer.data.crops import eval_box_xyxy, student_pixels
from trainer.export_cli import main as export_main
from trainer.exports.preprocessing import image_processor_settings
from trainer.model.eval_view import eval_pixels
from trainer.model.files import load_student
from trainer.model.student import StudentConfig
from trainer.recipes.recipe import Recipe
from trainer.run.build import make_student_config
from trainer.train_config import TrainConfig

SMALL = ["--image-size", "32", "--steps", "2", "--batch-size", "2", "--set", "adaptor_width=8", "--device", "cpu"]


def geometry(fit: Fit, resize_px: int = 32) -> ViewGeometry:
    return patch_geometry(32, 8, fit=fit, interpolation="bilinear", resize_px=resize_px)


def cache_of(folder: Path, **geometries: ViewGeometry) -> Cache:
    """A cache of teachers that see their images through these geometries."""
    write_images(folder / "images")
    teachers: dict[str, tuple[int | None, int]] = dict.fromkeys(geometries, (4, 5))
    return make_tiny_cache(folder / "c.zarr", folder / "images", teachers=teachers, geometries=geometries)


@pytest.mark.parametrize(
    ("geometries", "fit", "share"),
    [
        (
            {"clip": geometry("crop")},
            "crop",
            1.0,
        ),  # OpenAI CLIP, OpenCLIP, DINOv2, DINOv3, RADIO: the whole shorter side
        ({"timm": geometry("crop", 37)}, "crop", 32 / 37),
        ({"clip": geometry("crop"), "timm": geometry("crop", 64)}, "crop", 0.5),
        ({"clip": geometry("crop"), "sam": geometry("pad")}, "crop", 1.0),
        ({"siglip": geometry("squash"), "sam": geometry("pad")}, "squash", 1.0),
    ],
)
def test_a_student_is_shown_what_its_teachers_saw(
    tmp_path: Path, tiny_recipe: Recipe, geometries: dict[str, ViewGeometry], fit: str, share: float
) -> None:
    cache = cache_of(tmp_path, **geometries)
    names = tuple(geometries)
    config = make_student_config(TrainConfig(cache=cache.path, recipe=tiny_recipe, out=tmp_path / "run"), cache, names)
    assert (config.fit, config.centre_share) == (fit, share)
    if fit == "crop":
        box = eval_box_xyxy((3200, 6400), config.fit, config.centre_share)
        seen = min(
            (visible_box_xyxy((3200, 6400), one) for one in geometries.values()), key=lambda xyxy: xyxy[3] - xyxy[1]
        )
        assert box == pytest.approx(seen, abs=100)  # a teacher's own box is rounded to pixels of 32


def test_the_share_can_be_chosen_and_every_export_and_eval_agrees(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, clip=geometry("crop"))
    run, out = tmp_path / "run", tmp_path / "export"
    result = CliRunner().invoke(
        train_main, ["--cache", str(cache.path), "--out", str(run), "--centre-share", "0.75", *SMALL]
    )
    assert result.exit_code == 0, result.output
    assert json.loads((run / "student.json").read_text())["centre_share"] == 0.75
    arguments = ["--run", str(run), "--out", str(out), "--format", "safetensors", "--format", "hf", "--no-picture"]
    result = CliRunner().invoke(export_main, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads((out / "safetensors/student.json").read_text())["centre_share"] == 0.75
    smooth = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    photo = Image.fromarray(smooth).resize((120, 80), Image.Resampling.BICUBIC)
    expected = eval_pixels(photo, image_hw=(32, 32), fit="crop", centre_share=0.75)
    assert np.abs(expected.astype(int) - student_pixels(photo, (32, 32), (30.0, 10.0, 90.0, 70.0))).mean() < 6
    encoder = StudentEncoder.of_run(run, name="s", trained=True, device=torch.device("cpu"))
    np.testing.assert_array_equal(encoder.pixels_of(photo), expected)
    settings = json.loads((out / "hf/preprocessor_config.json").read_text())
    assert settings["size"] == {"shortest_edge": 43}  # 32 / 0.75
    settings.pop("image_processor_type")
    told = CLIPImageProcessor(**settings)(photo, return_tensors="np")["pixel_values"][0]
    told = told.transpose(1, 2, 0) * 255
    whole = student_pixels(photo, (32, 32), (20.0, 0.0, 100.0, 80.0))
    # One resize from a box, or a resize and a crop: alike to half a pixel, and unlike the whole centre.
    assert np.abs(told - expected).mean() < np.abs(told - whole).mean() / 3


def test_an_export_may_be_given_another_share(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, clip=geometry("crop"))
    run, out = tmp_path / "run", tmp_path / "export"
    assert CliRunner().invoke(train_main, ["--cache", str(cache.path), "--out", str(run), *SMALL]).exit_code == 0
    arguments = ["--run", str(run), "--out", str(out), "--no-picture", "--centre-share", "0.5"]
    result = CliRunner().invoke(export_main, arguments)
    assert result.exit_code == 0, result.output
    model = load_student(out)
    assert model.config.centre_share == 0.5
    assert image_processor_settings(model)["size"] == {"shortest_edge": 64}
    result = CliRunner().invoke(export_main, [*arguments[:3], str(tmp_path / "other"), "--centre-share", "1.5"])
    assert result.exit_code == 1
    assert "above 0 and at most 1, not 1.5" in result.output


def test_a_student_of_before_is_shown_what_it_was_shown(tiny_recipe: Recipe, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, clip=geometry("crop"))
    config = make_student_config(
        TrainConfig(cache=cache.path, recipe=tiny_recipe, out=tmp_path / "run"), cache, ("clip",)
    )
    document = json.loads(json.dumps(config.to_json()))
    assert StudentConfig.from_json(document) == config
    del document["centre_share"]
    assert StudentConfig.from_json(document) == replace(config, centre_share=0.875)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.01, float("nan")])
def test_an_impossible_share_is_refused(tiny_recipe: Recipe, share: float) -> None:
    with pytest.raises(ConfigError, match=r"centre_share must be above 0 and at most 1"):
        replace(tiny_recipe, centre_share=share)
