"""Students that start from a ViT of timm: the same features where nothing is resized, and what cannot be taken over."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from radio_cache.errors import ConfigError
from trainer.students import ViT, create_student

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}


@pytest.fixture
def small_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model timm builds here is a small one of its kind."""
    build = timm.create_model

    def small(name: str, **options: Any) -> Any:
        side = 56 if "patch14" in name else 64  # four patches
        return build(name, **{**TINY, "img_size": side, **options})

    monkeypatch.setattr(timm, "create_model", small)


def saved(name: str, path: Path) -> Any:
    """A timm model with weights that differ everywhere, saved where init_file finds it."""
    torch.manual_seed(1)
    model = timm.create_model(name).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save(model.state_dict(), path)
    return model


def student_from(name: str, path: Path, **overrides: Any) -> ViT:
    settings = {"width": 48, "depth": 2, "heads": 3, "patch_bias": True, "init_from": name, "init_file": str(path)}
    student = create_student("vit-tiny-16", **{**settings, **overrides}).eval()
    assert isinstance(student, ViT)
    return student


def without_norm(model: Any, images: Tensor) -> Tensor:
    """Tokens of a timm model before its final norm, of images in [0, 1]."""
    model.norm = torch.nn.Identity()
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return model.forward_features((images - mean) / std)


@pytest.mark.parametrize(
    ("name", "patch", "overrides"),
    [
        ("vit_small_patch16_224", 16, {}),
        ("vit_small_patch14_dinov2", 14, {}),  # layer scale
        ("vit_small_patch14_reg4_dinov2", 14, {"registers": 4}),
        ("vit_base_patch16_clip_224", 16, {"pre_norm": True}),
        ("vit_base_patch16_clip_224", 16, {"pre_norm": True, "spectral_reparam": True, "damp_sigma": 0.1}),
    ],
)
def test_features_are_those_of_timm_before_its_final_norm(
    small_timm: None, tmp_path: Path, name: str, patch: int, overrides: dict[str, Any]
) -> None:
    model = saved(name, tmp_path / "weights.pt")
    student = student_from(
        name, tmp_path / "weights.pt", patch_size=patch, max_resolution=4 * patch, **{"registers": 0, **overrides}
    )
    images = torch.rand(2, 3, 4 * patch, 4 * patch)
    with torch.no_grad():
        theirs, ours = without_norm(model, images), student(images)
    prefix = model.num_prefix_tokens
    torch.testing.assert_close(ours.summary, theirs[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.spatial, theirs[:, prefix:], rtol=1e-4, atol=1e-4)


def test_every_class_token_starts_as_that_of_the_model(small_timm: None, tmp_path: Path) -> None:
    model = saved("vit_small_patch14_dinov2", tmp_path / "weights.pt")
    student = student_from("vit_small_patch14_dinov2", tmp_path / "weights.pt", patch_size=14, num_summary_tokens=3)
    expected = (model.cls_token + model.pos_embed[:, :1])[0].expand(3, -1)
    torch.testing.assert_close(student.tokens[:3], expected)


def test_another_patch_size_and_table_start_close_to_the_model(small_timm: None, tmp_path: Path) -> None:
    """An even image through bigger patches gives the same embedding; the table spans what the model's spans, edge to edge."""
    model = saved("vit_small_patch16_224", tmp_path / "weights.pt")
    student = student_from("vit_small_patch16_224", tmp_path / "weights.pt", patch_size=14, max_resolution=140)
    table = student.positions.table.view(10, 10, -1)
    theirs = model.pos_embed[0, 1:].view(4, 4, -1)
    larger = torch.nn.functional.interpolate(
        theirs.permute(2, 0, 1)[None], (10, 10), mode="bicubic", align_corners=False
    )
    torch.testing.assert_close(table, larger[0].permute(1, 2, 0), rtol=1e-4, atol=1e-5)
    assert student.embed.weight.shape == (48, 3 * 14 * 14)


def test_positions_come_back_at_the_grid_of_the_model_they_are_of(small_timm: None, tmp_path: Path) -> None:
    source = saved("vit_small_patch16_224", tmp_path / "weights.pt")
    rows, columns = source.patch_embed.grid_size
    smooth = torch.randn(1, source.embed_dim, 4, 4)  # positions that are learned are smooth
    own = torch.nn.functional.interpolate(smooth, (rows, columns), mode="bicubic")[0].flatten(1).T
    state = source.state_dict()
    state["pos_embed"][0, -rows * columns :] = own
    torch.save(state, tmp_path / "weights.pt")
    student = student_from("vit_small_patch16_224", tmp_path / "weights.pt", max_resolution=2048)
    assert student.positions.side == 128
    read = student.positions.top_left((rows, columns))
    assert (read - own).norm() < 0.02 * own.norm()


def test_what_does_not_fit_is_named_on_both_sides(small_timm: None, tmp_path: Path) -> None:
    saved("vit_base_patch16_clip_224", tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=r"depth=2 \(here 3\), pre_norm=True \(here False\)"):
        student_from("vit_base_patch16_clip_224", tmp_path / "weights.pt", depth=3)
    saved("vit_small_patch16_224", tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match="patch_bias=true"):
        student_from("vit_small_patch16_224", tmp_path / "weights.pt", patch_bias=False)


def test_another_activation_is_refused(small_timm: None, tmp_path: Path) -> None:
    saved("vit_base_patch16_clip_quickgelu_224", tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=r"QuickGELU.*without 'quickgelu'"):
        student_from("vit_base_patch16_clip_quickgelu_224", tmp_path / "weights.pt", pre_norm=True)


def test_missing_models_files_and_other_architectures_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no model 'vit_smal'"):
        create_student("vit-tiny-16", init_from="vit_smal")
    with pytest.raises(ConfigError, match=r"there is no file .*nowhere.pt"):
        create_student("vit-tiny-16", init_from="vit_small_patch16_224", init_file=str(tmp_path / "nowhere.pt"))
    with pytest.raises(ConfigError, match="init_file needs init_from"):
        create_student("vit-tiny-16", init_file="weights.pt")
    torch.save(timm.create_model("resnet10t", num_classes=0).state_dict(), tmp_path / "resnet.pt")
    with pytest.raises(ConfigError, match="'resnet10t' is a ResNet, not a ViT"):
        create_student("vit-tiny-16", init_from="resnet10t", init_file=str(tmp_path / "resnet.pt"))
