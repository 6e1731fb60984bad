"""The table of teachers: everything about each, no wider than a terminal, and the same for machines."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from cache_builder.cli import main
from cache_builder.commands.teachers import image_bytes
from cache_builder.teachers import ALIASES, TEACHERS, find_teacher


@pytest.fixture(scope="module")
def printed() -> str:
    result = CliRunner().invoke(main, ["teachers"])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_teacher_stands_in_both_tables_with_its_short_name(printed: str) -> None:
    lines = printed.splitlines()
    for preset in TEACHERS.values():
        sizes, weights = [line for line in lines if line.split()[:1] == [preset.name]]
        assert preset.params in sizes
        assert f" {preset.input_px} px " in sizes
        assert preset.licence in weights
        assert preset.weights.size in weights
        place = preset.weights.hub[0] if preset.weights.hub else preset.weights.describe()
        assert place[:40] in weights
    for alias, name in ALIASES.items():
        assert f"\n{name} ({alias}) " in printed
    assert "pass it with `radio-cache build --weights FILE`" in printed


def test_it_fits_a_file_of_110_columns_and_only_long_addresses_wrap(printed: str) -> None:
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 110
    assert sum(line.startswith(" ") for line in lines) == 6  # the addresses of SAM's files, with and without the neck


def test_bytes_are_those_of_map_and_summary() -> None:
    preset = TEACHERS["dinov2-vit-b-14"]
    assert image_bytes(preset, "half") == 2 * (16 * 16 * 768 + 768)
    assert image_bytes(preset, "int8") == 16 * 16 * 768 + 2 * 768
    assert image_bytes(TEACHERS["sam-vit-h"], "half") == 2 * 64 * 64 * 256


def test_json_holds_the_same_on_standard_output_or_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "teachers.json"
    shown = CliRunner().invoke(main, ["teachers", "--json"])
    assert CliRunner().invoke(main, ["teachers", "--json", str(file)]).output == ""
    told = json.loads(file.read_text())
    assert json.loads(shown.output) == told
    assert [one["name"] for one in told] == list(TEACHERS)
    (clip,) = [one for one in told if "clip" in one["aliases"]]
    assert clip["tokens"] == [27, 27]
    assert (clip["summary_dim"], clip["spatial_dim"]) == (1024, 1280)
    assert clip["image_bytes"]["half"] == 2 * (27 * 27 * 1280 + 1024)
    assert clip["weights"] == "huggingface.co/apple/DFN5B-CLIP-ViT-H-14-378, file open_clip_model.safetensors"


def test_the_same_teacher_by_two_libraries_sees_different_shares_of_a_photo() -> None:
    """61 % and 100 % of a 4:3 photo: timm crops SigLIP 2 after a resize, open_clip squashes."""
    shares = {
        name: round(find_teacher(name).photo_share, 2)
        for name in (
            "timm:vit_base_patch16_siglip_224.v2_webli",
            "open_clip:ViT-B-16-SigLIP2/webli",
            "clip",
            "dinov2",
            "sam",
        )
    }
    assert shares["open_clip:ViT-B-16-SigLIP2/webli"] == 1.0
    assert shares["timm:vit_base_patch16_siglip_224.v2_webli"] == pytest.approx(0.61, abs=0.01)
    assert (shares["clip"], shares["dinov2"], shares["sam"]) == (1.0, 0.75, 1.0)


def test_teachers_lists_any_librarys_model_by_its_name() -> None:
    done = CliRunner().invoke(main, ["teachers", "timm:resnet18.a1_in1k", "dinov2"])
    assert done.exit_code == 0, done.output
    assert "timm-resnet18.a1_in1k" in done.output
    assert "75%" in done.output
