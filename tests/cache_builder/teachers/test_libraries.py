"""Teachers by their library's names: found, refused with the nearest, and named in a cache so that they are found again."""

from pathlib import Path

import open_clip
import pytest
import timm
import torch

from cache_builder.teachers import (
    TeacherOptions,
    find_teacher,
    find_weights,
    group_name,
    load_recorded,
    load_teacher,
    recorded_name,
)
from cache_builder.teachers.libraries import is_library_name
from radio_cache.errors import ConfigError, TeacherWeightsError, UnknownTeacherError
from radio_cache.testing import fake_spec


def all_names() -> list[str]:
    return [
        *(f"timm:{model}" for model in [*timm.list_models(), *timm.list_models(pretrained=True)]),
        *(f"open_clip:{model}" for model in open_clip.list_models()),
        *(f"open_clip:{model}/{tag}" for model, tag in open_clip.list_pretrained()),
    ]


def test_every_model_of_both_libraries_has_a_group_name_of_its_own() -> None:
    names = all_names()
    groups = {group_name(name) for name in names}
    assert len(groups) == len(set(names)) > 2500
    for group in groups:
        fake_spec(group, summary_dim=None, spatial_dim=1)  # raises for what cannot name a group


def test_the_name_of_a_group_reads_like_the_model() -> None:
    assert group_name("open_clip:ViT-B-32/laion2b_e16") == "open_clip-vit-b-32.laion2b_e16"
    assert group_name("timm:vit_base_patch16_224.augreg_in21k") == "timm-vit_base_patch16_224.augreg_in21k"


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("timm:resnet18", True), ("open_clip:RN50", True), ("clip", False), ("s3:x", False), ("timm", False)],
)
def test_a_librarys_name_is_told_from_ours(name: str, is_one: bool) -> None:
    assert is_library_name(name) == is_one


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet_18", r"timm .* has no model 'resnet_18'\. Nearest of its \d+: .*resnet18"),
        ("timm:resnet18.imagenet", r"timm .* has no weights 'imagenet' of resnet18\. Known: .*a1_in1k"),
        ("timm:", "has no model ''"),
        ("open_clip:vit-b-32/openai", r"open_clip has no model 'vit-b-32'\. Nearest of its \d+: ViT-B-32"),
        ("open_clip:ViT-B-32/laion", r"open_clip has no weights 'laion' of ViT-B-32\. Known: openai, "),
    ],
)
def test_an_unknown_model_is_refused_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UnknownTeacherError, match=message):
        find_teacher(name)


@pytest.mark.parametrize(
    "name", ["timm:eca_nfnet_l0.ra2_in1k", "timm:convnext_base.fb_in22k_ft_in1k_384", "timm:vit_7b_patch16_dinov3"]
)
def test_what_a_models_images_need_is_read_from_its_own_configuration(name: str) -> None:
    config = timm.get_pretrained_cfg(name.removeprefix("timm:"))
    assert config is not None
    preset = find_teacher(name)
    assert preset.input_px == config.input_size[1]
    assert preset.fit == {"center": "crop", "squash": "squash"}[config.crop_mode]


def of_kind(crop_mode: str | None = None, *, square: bool = True, larger: bool = False) -> str:
    """A published model of timm that wants its images so."""
    for model in timm.list_models(pretrained=True):
        config = timm.get_pretrained_cfg(model)
        assert config is not None
        h, w = config.input_size[1:]
        if (h == w) == square and (config.crop_pct > 1) == larger and crop_mode in (None, config.crop_mode):
            return f"timm:{model}"
    raise AssertionError


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (of_kind("border"), "fits its images by 'border', which is not supported; known are center, squash"),
        (of_kind("squash", square=False), r"takes input of \d+ x \d+ pixels; teachers take square input"),
        (of_kind(larger=True), "with crop_pct 1.*, which is not supported"),
    ],
    ids=["border", "not square", "beyond the image"],
)
def test_preprocessing_that_is_not_done_here_is_refused_and_not_approximated(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_teacher(name)


def test_a_model_without_published_weights_asks_for_a_file() -> None:
    with pytest.raises(
        TeacherWeightsError, match="no weights are published for hieradet_small: pass yours with --weights"
    ):
        find_weights(find_teacher("timm:hieradet_small"), None)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("timm:resnet18.a1_in1k", "huggingface.co/timm/resnet18.a1_in1k, file model.safetensors"),
        (
            "open_clip:ViT-B-32/laion2b_s34b_b79k",
            "huggingface.co/laion/CLIP-ViT-B-32-laion2B-s34B-b79K, file open_clip_model",
        ),
        (
            "open_clip:ViT-B-32-quickgelu/openai",
            "huggingface.co/timm/vit_base_patch32_clip_224.openai, file open_clip_model",
        ),
    ],
)
def test_published_weights_come_from_where_the_library_has_them(name: str, place: str) -> None:
    assert find_teacher(name).weights.describe().startswith(place)


def test_a_recorded_teacher_of_a_library_is_found_again(tmp_path: Path) -> None:
    net = timm.create_model("test_vit", pretrained=False)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    teacher = load_teacher(
        "timm:test_vit.r160_in1k", TeacherOptions(weights=tmp_path / "w.pth", size_px=96, fit="squash")
    )
    assert teacher.spec.name == "timm-test_vit.r160_in1k"
    assert teacher.spec.model == "timm:test_vit.r160_in1k"
    assert load_recorded(teacher.spec).spec == teacher.spec


def test_a_further_size_of_it_is_a_level_and_is_found_again(tmp_path: Path) -> None:
    name = "timm:test_vit.r160_in1k"
    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / "w.pth")
    teacher = load_teacher(name, TeacherOptions(weights=tmp_path / "w.pth", size_px=96, level_of=name))
    assert (teacher.spec.name, teacher.spec.level_of) == ("timm-test_vit.r160_in1k@96", "timm-test_vit.r160_in1k")
    assert recorded_name(teacher.spec) == name
    assert load_recorded(teacher.spec).spec == teacher.spec
