"""One contract for every teacher that can be named."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from cache_builder.teachers import (
    ALIASES,
    FAMILIES,
    TEACHERS,
    TeacherOptions,
    find_teacher,
    find_weights,
    load_recorded,
    load_teacher,
)
from radio_cache.errors import TeacherWeightsError, UnknownTeacherError
from radio_cache.testing import fake_spec

PACKAGED = "efficientnet-lite0"


@pytest.mark.parametrize("name", TEACHERS)
def test_contract_of_a_preset(name: str) -> None:
    preset = TEACHERS[name]
    assert preset.name == name
    assert find_teacher(name) is preset
    assert preset.family in FAMILIES
    fake_spec(name, summary_dim=None, spatial_dim=1)  # the name can name a group
    assert re.fullmatch(r"[\d.]+ M", preset.params)
    assert re.fullmatch(r"[\d.]+ [MG]B", preset.weights.size)
    assert preset.licence
    assert preset.input_px > 0
    assert preset.fit in ("squash", "crop", "pad")


def test_names_that_people_rely_on_are_there() -> None:
    promised = {
        "clip",
        "dfn-clip-vit-h-14-378",
        "openai-clip-vit-l-14-336",
        "openclip-vit-h-14",
        "metaclip-vit-h-14",
        "dinov2",
        *(f"dinov2-vit-{size}-14{registers}" for size in "sblg" for registers in ("", "-reg")),
        "siglip2-g-384",
        *(f"dinov3-vit-{size}-16" for size in ("s", "s-plus", "b", "l", "h-plus", "7b")),
        *(f"dinov3-convnext-{size}" for size in "tsbl"),
        "c-radio-v4-h",
        "c-radio-v4-so400m",
        *(f"c-radio-v3-{size}" for size in "blhg"),
        "sam",
        "sam-vit-h",
        "sam-vit-l",
        "sam-vit-b",
        "sam-trunk",
        *(f"sam-vit-{size}-trunk" for size in "hlb"),
        *(f"efficientnet-lite{number}" for number in range(3)),
    }
    assert promised <= TEACHERS.keys() | ALIASES.keys()


def test_an_alias_keeps_the_users_name_and_is_the_long_names_teacher() -> None:
    for alias, name in ALIASES.items():
        assert replace(find_teacher(alias), name=name) == TEACHERS[name]
        assert find_teacher(alias).name == alias


@pytest.mark.parametrize(("typed", "nearest"), [("dinov2-vitl14", "dinov2-vit-l-14"), ("SAM", "sam"), ("clpi", "clip")])
def test_an_unknown_teacher_error_names_the_nearest_and_says_where_all_are_listed(typed: str, nearest: str) -> None:
    with pytest.raises(UnknownTeacherError) as caught:
        find_teacher(typed)
    assert str(caught.value).startswith(f"no teacher is called '{typed}'. Did you mean '{nearest}'")
    assert str(caught.value).endswith(
        f"`radio-cache teachers` lists all {len(TEACHERS) + len(ALIASES)}. timm:MODEL and open_clip:MODEL/WEIGHTS are teachers "
        "too."
    )


@pytest.mark.parametrize("typed", ["sam2", "SAM2-hiera-large", "sam-2.1-b"])
def test_who_asks_for_sam_2_is_told_why_there_is_none(typed: str) -> None:
    with pytest.raises(UnknownTeacherError, match=r"three maps .* a neck, and timm has that encoder without the neck"):
        find_teacher(typed)


def test_a_recorded_teacher_is_loaded_as_it_was() -> None:
    spec = load_teacher(PACKAGED, TeacherOptions(size_px=96, fit="squash")).spec
    assert load_recorded(spec).spec == spec


def test_a_recorded_teacher_whose_weights_changed_is_refused() -> None:
    spec = replace(load_teacher(PACKAGED).spec, weights_sha256="0" * 64)
    with pytest.raises(TeacherWeightsError, match="are not the ones this cache was built with"):
        load_recorded(spec)


def test_a_recorded_teacher_whose_file_is_gone_is_refused(tmp_path: Path) -> None:
    spec = replace(load_teacher(PACKAGED).spec, weights=str(tmp_path / "gone.pth"))
    with pytest.raises(TeacherWeightsError, match=r"are not at .*gone\.pth any more .* with --weights"):
        load_recorded(spec)
    there = find_weights(find_teacher(PACKAGED), None)
    assert load_recorded(spec, there).spec.weights == str(there.resolve())
