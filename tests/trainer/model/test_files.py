import json
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from radio_cache.errors import ConfigError, NotACacheError, RadioCacheError, StoreError
from radio_cache.reader import Cache
from trainer import TrainConfig, load_student, train
from trainer.export_cli import main as export_main
from trainer.model.adaptors import AdaptorOutput, MlpHead, TeacherWidths, fold_into_last
from trainer.model.files import save_student
from trainer.model.student import StudentConfig, backbone_and_heads, build_distilled
from trainer.recipes.recipe import Recipe, override_stages


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
    recipe = replace(override_stages(tiny_recipe, steps=60, lr=5e-3), crop_area=(0.9, 1.0))
    train(TrainConfig(cache=tiny_cache.path, recipe=recipe, out=tmp_path / "run"))
    model = load_student(tmp_path / "run", adaptors="all")
    from radio_cache.images.decode import decode_image
    from trainer.data.crops import student_pixels

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
    recipe = replace(
        override_stages(tiny_recipe, steps=25, lr=5e-3),
        adaptor="residual-mlp",
        adaptor_blocks=1,
        adaptor_upsample=2,
        crop_area=(0.9, 1.0),
        shift_tokens=0.5,
        normalise="phi-s",
    )
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


def plain_student(folder: Path) -> Path:
    """A saved student without training."""
    config = StudentConfig(
        student="e-radio-tiny",
        overrides={"width": 8, "stem_width": 4, "depths": [1, 1, 1, 1], "heads": [2, 2], "bias_hidden": 8},
        image_hw=(32, 32),
        fit="squash",
        teachers=(TeacherWidths(name="t", summary_dim=4, spatial_dim=4),),
        adaptor_width=4,
        seed=0,
        steps=1,
        images_seen=1,
        cache="gone.zarr",
        run="run",
        recipe="tiny",
    )
    save_student(build_distilled(config).eval(), folder)
    return folder


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / "student.json").read_text())
    change(document)
    (folder / "student.json").write_text(json.dumps(document))


def test_a_flipped_byte_of_the_weights_is_found_before_it_is_used_or_exported(tmp_path: Path) -> None:
    student = plain_student(tmp_path / "student")
    weights = student / "student.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(
        StoreError, match=r"student.safetensors is not the file that was written with student.json: its SHA-256"
    ):
        load_student(student)
    result = CliRunner().invoke(export_main, ["--run", str(student), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "restore it from a copy" in result.output
    assert not (tmp_path / "out").exists()
    changed(student, lambda document: document.pop("weights_sha256"))  # as before it was recorded
    load_student(student)


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 100, 3000, -5000, -1])
def test_weights_that_are_cut_are_called_damaged_by_name(tmp_path: Path, cut: int) -> None:
    student = plain_student(tmp_path / "student")
    weights = student / "student.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(StoreError, match=r"student.safetensors is damaged"):
        load_student(student)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"3",
        b'"x"',
        b"{",
        b"{}",
        b"\xff\xfe",
        b'{"export_version": 1}',
        b'{"export_version": 1, "export_version": 1}',
        b'{"export_version": NaN}',
        b"[" * 5000,
    ],
)
def test_an_odd_description_is_answered_in_a_sentence(tmp_path: Path, text: bytes) -> None:
    student = plain_student(tmp_path / "student")
    (student / "student.json").write_bytes(text)
    with pytest.raises(RadioCacheError, match=r"student.json(: this student was saved| is damaged)"):
        load_student(student)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("student", None),
        ("student", 3),
        ("student", "nobody"),
        ("student", ""),
        ("student", "timm:"),
        ("student", "torch-module:"),
        ("overrides", None),
        ("overrides", []),
        ("overrides", {"nobody": 1}),
        ("overrides", {"depths": "x"}),
        ("overrides", {"width": -8}),
        ("overrides", {"width": None}),
        ("overrides", {"name": "x"}),
        ("overrides", {"width": 8.5}),
        ("image_hw", 32),
        ("image_hw", [32]),
        ("image_hw", [0, 32]),
        ("image_hw", [-32, 32]),
        ("image_hw", [32.5, 32]),
        ("image_hw", ["a", "b"]),
        ("image_hw", [1_000_000, 1_000_000]),
        ("fit", "stretch"),
        ("fit", None),
        ("teachers", None),
        ("teachers", [{}]),
        ("teachers", [3]),
        ("teachers", []),
        ("teachers", [{"name": "t"}]),
        ("adaptor_width", "wide"),
        ("adaptor_width", -4),
        ("adaptor_width", 0),
        ("adaptor", "none"),
        ("adaptor_blocks", -1),
        ("seed", "x"),
        ("seed", None),
        ("seed", 1 << 70),
        ("steps", None),
        ("weights_sha256", 3),
        ("weights_sha256", "00"),
        ("centre_share", 0),
        ("centre_share", 2),
        ("nobody", 1),
    ],
)
def test_an_impossible_field_of_the_description_is_answered_with_its_place(
    tmp_path: Path, field: str, value: Any
) -> None:
    student = plain_student(tmp_path / "student")
    changed(student, lambda document: document.update({field: value}))
    with pytest.raises(RadioCacheError, match=r"student\.(json|safetensors)"):
        load_student(student)


@pytest.mark.parametrize(
    "change",
    [
        {"overrides": {"width": 1 << 20}},
        {"overrides": {"depths": [1, 1, 1, 10**9]}},
        {"overrides": {"windows": [1 << 20, 1 << 20]}},
        {"adaptor_width": 1 << 40},
        {"adaptor": "residual-mlp", "adaptor_blocks": 10**9},
        {"adaptor": "residual-mlp", "adaptor_upsample": 10**5},
        {"teachers": [{"name": "t", "summary_dim": 4, "spatial_dim": 1 << 40}]},
        {"student": "vit-tiny-16", "overrides": {"depth": 10**9}},
        {"student": "vit-tiny-16", "overrides": {"max_resolution": 10**8}},
        {"student": "vit-tiny-16", "overrides": {"registers": 10**9}},
        {"student": "timm:vit_tiny_patch16_224", "overrides": {"img_size": 16 << 16}},
        {"student": "timm:vit_tiny_patch16_224", "overrides": {"embed_dim": 3 << 30}},
    ],
)
def test_absurd_sizes_are_refused_without_taking_memory_for_them(tmp_path: Path, change: dict[str, Any]) -> None:
    student = plain_student(tmp_path / "student")
    changed(student, lambda document: document.update(change))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RadioCacheError, match=r"student\.(json|safetensors)"):
        load_student(student)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "kilobytes"


def test_a_reparametrised_vit_is_trained_resumed_and_exported_plain(
    tiny_cache: Cache, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    overrides = {
        "width": 24,
        "depth": 2,
        "heads": 2,
        "spectral_reparam": True,
        "damp_sigma": 0.05,
        "train_windows": [2],
        "window_probability": 0.5,
        "num_global": 1,
    }
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
    recipe = replace(override_stages(tiny_recipe, steps=1), student="vit-tiny-16", student_overrides=overrides)
    train(TrainConfig(cache=tiny_cache.path, recipe=recipe, out=tmp_path / "run"))
    started = load_student(tmp_path / "run", untrained=True)
    start.unlink()
    trained = load_student(tmp_path / "run")
    assert trained.config == started.config
    with pytest.raises(ConfigError, match="there is no file"):
        load_student(tmp_path / "run", untrained=True)


def test_a_pointer_of_git_lfs_in_place_of_the_weights_is_called_damaged(tmp_path: Path) -> None:
    student = plain_student(tmp_path / "student")
    (student / "student.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(StoreError, match=r"student.safetensors is damaged"):
        load_student(student)
