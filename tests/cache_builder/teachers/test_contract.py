"""One body over every registered teacher: on a small random stand-in what it does, on the meta device what it is."""

import json
import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from segment_anything.build_sam import _build_sam

from cache_builder.teachers import TEACHERS, TeacherOptions, TeacherPreset, load_recorded, load_teacher
from cache_builder.teachers.base import Teacher
from cache_builder.teachers.clip_tower import published_tower
from cache_builder.teachers.state_dict import WeightsFile
from cache_builder.teachers.weights import file_sha256
from radio_cache.format.schema import TeacherSpec
from radio_cache.geometry.crops import photo_share, valid_tokens

See = Callable[[Teacher, Image.Image], torch.Tensor]
StandIn = Callable[..., tuple[Teacher, Any]]

ONE_OF_EACH = (
    "openclip-vit-h-14",
    "dfn-clip-vit-h-14-378",
    "siglip2-g-384",
    "dinov2-vit-s-14",
    "dinov2-vit-g-14-reg",
    "dinov3-vit-s-16",
    "dinov3-vit-7b-16",
    "dinov3-convnext-t",
    "c-radio-v3-b",
    "c-radio-v4-so400m",
    "sam-vit-b",
    "efficientnet-lite0",
)
"""Of every class and every kind of network; the others differ from these by numbers only, which the meta device checks."""


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_photo_becomes_features_of_the_shape_that_the_spec_says(
    name: str, stand_in: StandIn, seen_by: See, chelsea: Image.Image
) -> None:
    teacher, _ = stand_in(name)
    spec = teacher.spec
    cut = chelsea.crop((0, 0, 301, 187))
    images = seen_by(teacher, cut)
    assert images.shape == (1, 3, *spec.geometry.input_hw)
    with torch.inference_mode():
        out, again = teacher(images), teacher(images)
    assert out.spatial.shape == (1, *spec.geometry.grid_hw, spec.spatial_dim)
    assert torch.isfinite(out.spatial).all()
    assert torch.equal(out.spatial, again.spatial)
    assert (out.summary is None) == (spec.summary_dim is None)
    if out.summary is not None:
        assert out.summary.shape == (1, spec.summary_dim)
        assert torch.isfinite(out.summary).all()
    assert out.spatial.std() > 0
    assert valid_tokens((187, 301), spec.geometry).any()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_images_in_a_batch_do_not_see_each_other(name: str, stand_in: StandIn) -> None:
    teacher, _ = stand_in(name)
    images = torch.randn(2, 3, *teacher.spec.geometry.input_hw)
    with torch.inference_mode():
        both, second = teacher(images), teacher(images[1:])
    torch.testing.assert_close(both.spatial[1:], second.spatial, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_spec_names_file_and_hash_and_survives_json_and_finds_the_teacher_again(
    name: str, stand_in: StandIn
) -> None:
    teacher, network = stand_in(name)
    spec = teacher.spec
    assert spec.name == name
    assert spec.licence == TEACHERS[name].licence
    assert TeacherSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert load_recorded(spec).spec == spec
    if network is not None:
        assert spec.weights_sha256 == file_sha256(Path(spec.weights))


def test_the_representatives_are_of_every_family() -> None:
    assert {TEACHERS[name].family for name in ONE_OF_EACH} == {preset.family for preset in TEACHERS.values()}


# ---------------------------------------------------------------- the real networks, without their numbers


def published_state(preset: TeacherPreset) -> dict[str, torch.Tensor]:
    """Names and shapes of the published weights, as the library builds the network."""
    match preset.family:
        case "clip":
            net = published_tower(preset.model).build()
            return {f"visual.{key}": value for key, value in net.state_dict().items()}
        case "sam":
            # width, depth, heads and global blocks as in segment_anything/build_sam.py
            width, depth, heads, every = {"h": (1280, 32, 16, 8), "l": (1024, 24, 16, 6), "b": (768, 12, 12, 3)}[
                preset.model[-1]
            ]
            sam = _build_sam(width, depth, heads, [*range(every - 1, depth, every)])
            return sam.state_dict()
        case _:
            choice = {} if preset.timm.global_pool is None else {"global_pool": preset.timm.global_pool}
            return timm.create_model(preset.model, pretrained=False, num_classes=0, **choice).state_dict()


MODULES = {"dinov3": "timm_model", "c-radio": "timm_model"}


@pytest.mark.parametrize("preset", [p for p in TEACHERS.values() if p.weights.package is None], ids=lambda p: p.name)
def test_what_the_table_says_is_what_the_real_network_is(
    preset: TeacherPreset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    family = import_module(f"cache_builder.teachers.{MODULES.get(preset.family, preset.family)}")
    reader = "read_clip_file" if preset.family == "clip" else "read_weights_file"
    (tmp_path / "w.pth").write_bytes(b"")
    with torch.device("meta"), torch.no_grad():
        state = published_state(preset)
        monkeypatch.setattr(family, reader, lambda path, **_: WeightsFile(dict(state)))
        teacher = load_teacher(preset.name, TeacherOptions(weights=tmp_path / "w.pth"))
        out = teacher(torch.zeros(1, 3, preset.input_px, preset.input_px))
    assert_as_told(preset, teacher.spec)
    assert teacher.notes == ()  # the published architecture, to the last tensor
    assert out.spatial.shape == (1, *teacher.spec.geometry.grid_hw, teacher.spec.spatial_dim)
    image_tower = [
        value.numel()
        for key, value in state.items()
        if preset.family not in ("clip", "sam") or key.startswith(("visual.", "image_encoder."))
    ]
    assert float(preset.params.removesuffix(" M")) == pytest.approx(sum(image_tower) / 1e6, abs=0.5)


@pytest.mark.parametrize("preset", [p for p in TEACHERS.values() if p.weights.package], ids=lambda p: p.name)
def test_what_the_table_says_of_packaged_teachers_is_what_they_are(preset: TeacherPreset) -> None:
    assert_as_told(preset, load_teacher(preset.name).spec)


def assert_as_told(preset: TeacherPreset, spec: TeacherSpec) -> None:
    told = preset.output
    assert told is not None
    assert spec.geometry.input_hw == (preset.input_px, preset.input_px)
    assert spec.geometry.fit == preset.fit
    assert photo_share(spec.geometry) == pytest.approx(preset.photo_share, abs=0.005)
    assert spec.geometry.grid_hw == (told.tokens, told.tokens)
    assert (spec.summary_dim, spec.spatial_dim) == (told.summary_dim, told.spatial_dim)
    assert math.isclose(spec.geometry.stride_px * told.tokens, preset.input_px, rel_tol=0.15)
