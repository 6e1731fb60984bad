from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from radio_cache.errors import ConfigError, NotACacheError, StoreError
from radio_cache.reader import Cache
from trainer import TrainConfig, load_student, train
from trainer.adaptors import AdaptorOutput, MlpHead, fold_into_last
from trainer.distilled import backbone_and_heads
from trainer.export_cli import main as export_main
from trainer.recipe import Recipe, everywhere


def test_folded_statistics_give_the_teachers_own_units() -> None:
    torch.manual_seed(0)
    head = MlpHead(5, 8, 3)
    x, mean, std = torch.randn(4, 5), torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 4.0, 2.0])
    standardised = head(x)
    fold_into_last(head, std, mean)
    torch.testing.assert_close(head(x), standardised * std + mean)


def test_a_trained_student_speaks_in_the_units_of_the_cache(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    """The exported heads are near the cached maps themselves; without the folded mean they could not be."""
    recipe = replace(everywhere(tiny_recipe, steps=60, lr=5e-3), crop_area=(0.9, 1.0))
    train(TrainConfig(cache=tiny_cache.path, recipe=recipe, out=tmp_path / "run"))
    model = load_student(tmp_path / "run", adaptors="all")
    from radio_cache.images import decode_image
    from trainer.data import student_pixels

    teacher = tiny_cache.teachers["fake-a"]
    row = int(tiny_cache.usable_rows(["fake-a"])[0])
    pixels = student_pixels(decode_image(tiny_cache.read_file(row)), (32, 32))
    with torch.inference_mode():
        _, heads = backbone_and_heads(model(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255))
    said = heads["fake-a"].spatial[0].numpy().mean(axis=0)
    cached = teacher.maps([row])[0].mean(axis=(0, 1))
    mean, std = teacher.spatial_mean_std()
    assert np.abs(said - cached).mean() < np.abs(mean - cached).mean()
    assert np.abs(said - cached).mean() < 0.9 * std.mean()


def test_export_and_load_give_the_same_features(tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path) -> None:
    train(TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=tmp_path / "run"))
    result = CliRunner().invoke(export_main, ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "student")])
    assert result.exit_code == 0, result.output
    assert "adaptors=['fake-a', 'fake-b']" in result.output
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        one, other = (load_student(tmp_path / name, adaptors="all")(images) for name in ("run", "student"))
        untrained = load_student(tmp_path / "student", untrained=True)(images)
    assert torch.equal(one["backbone"].summary, other["backbone"].summary)
    assert torch.equal(one["fake-a"].spatial, other["fake-a"].spatial)
    assert not torch.equal(untrained.summary, one["backbone"].summary)


def test_without_adaptors_a_model_gives_summary_and_features_and_with_them_a_dict_of_both(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    train(TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=tmp_path / "run"))
    images = torch.rand(2, 3, 32, 64)
    with torch.inference_mode():
        summary, features = load_student(tmp_path / "run")(images)
        model = load_student(tmp_path / "run", adaptors=["fake-b"])
        out, maps = model(images), model(images, feature_fmt="NCHW")
    assert list(out) == ["backbone", "fake-b"]
    assert torch.equal(out["backbone"].summary, summary)
    assert torch.equal(out["backbone"].spatial, features)
    assert maps["backbone"].spatial.shape == (2, model.embed_dim, 2, 4)
    assert torch.equal(maps["fake-b"].spatial[:, :, 1, 2], out["fake-b"].spatial[:, 6])
    assert isinstance(out["fake-b"], AdaptorOutput)
    assert out["fake-b"].summary is None


def test_residual_heads_that_upsample_are_trained_and_speak_of_a_finer_grid_in_the_teachers_units(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = replace(everywhere(tiny_recipe, steps=25, lr=5e-3), adaptor="residual-mlp", adaptor_blocks=1, adaptor_upsample=2,
                     crop_area=(0.9, 1.0), shift_tokens=0.5, normalise="phi-s")  # fmt: skip
    train(TrainConfig(cache=tiny_cache.path, recipe=recipe, out=tmp_path / "run", teachers=("fake-a",)))
    model = load_student(tmp_path / "run", adaptors=["fake-a"])
    with torch.inference_mode():
        said = model(torch.rand(2, 3, 32, 32), feature_fmt="NCHW")
    assert said["backbone"].spatial.shape[-2:] == (2, 2)
    assert said["fake-a"].spatial.shape[-2:] == (4, 4)
    mean, std = tiny_cache.teachers["fake-a"].spatial_mean_std()
    # Without the folded shift, heads would speak of values around zero.
    apart = (said["fake-a"].spatial.mean((0, 2, 3)).numpy() - mean) / std
    assert np.abs(apart).mean() < 0.5 * np.abs(mean / std).mean()


def test_what_is_not_a_student_is_named(tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(NotACacheError, match="holds no trained student"):
        load_student(tmp_path)
    train(TrainConfig(cache=tiny_cache.path, recipe=tiny_recipe, out=tmp_path / "run"))
    with pytest.raises(ConfigError, match="no adaptor of this student is called 'fake-x'"):
        load_student(tmp_path / "run", adaptors=["fake-x"])
    config = tmp_path / "run/student.json"
    written = config.read_text()
    config.write_text(written.replace('"adaptor_width": 16', '"adaptor_width": 24'))
    with pytest.raises(StoreError, match="does not fit student 'e-radio-tiny' as this radio-cache builds it"):
        load_student(tmp_path / "run")
    config.write_text(written)
    result = CliRunner().invoke(export_main, ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "run")])
    assert result.exit_code == 1
    assert "exists and is not empty" in result.output


def test_a_reparametrised_vit_is_trained_resumed_and_exported_plain(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    overrides = {"width": 24, "depth": 2, "heads": 2, "spectral_reparam": True, "damp_sigma": 0.05,
                 "train_windows": [2], "window_probability": 0.5, "num_global": 1}  # fmt: skip
    recipe = replace(tiny_recipe, student="vit-tiny-16", student_overrides=overrides)
    train(TrainConfig(cache=tiny_cache.path, recipe=recipe, out=tmp_path / "run"))
    model = load_student(tmp_path / "run")
    assert model.config.overrides == {"num_summary_tokens": 1, "width": 24, "depth": 2, "heads": 2, "num_global": 1}
    assert not [name for name in model.state_dict() if "parametrizations" in name or "window_draws" in name]
    # The last checkpoint still has the reparametrised weights, and training goes on from it.
    again = train(TrainConfig(cache=tiny_cache.path, recipe=recipe, out=tmp_path / "run"))
    assert again.steps_before == recipe.steps


def test_weights_a_student_started_from_are_not_fetched_again_for_a_trained_one(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    import timm

    start = tmp_path / "start.pt"
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), start)
    overrides = {"depth": 12, "patch_bias": True, "init_from": "vit_tiny_patch16_224", "init_file": str(start)}
    recipe = replace(everywhere(tiny_recipe, steps=1), student="vit-tiny-16", student_overrides=overrides)
    train(TrainConfig(cache=tiny_cache.path, recipe=recipe, out=tmp_path / "run"))
    started = load_student(tmp_path / "run", untrained=True)
    start.unlink()
    trained = load_student(tmp_path / "run")
    assert trained.config == started.config
    with pytest.raises(ConfigError, match="there is no file"):
        load_student(tmp_path / "run", untrained=True)
