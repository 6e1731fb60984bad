"""Every format holds the student: read back by the library it is for, on batches it was not made with."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner

from radio_cache.errors import NotACacheError
from trainer import load_student
from trainer.export_cli import FORMATS as CLI_FORMATS
from trainer.export_cli import main as export_main
from trainer.exports import FORMATS, ExportError, export_student
from trainer.exports.written import flat_features

IMAGES = torch.rand(5, 3, 64, 96, generator=torch.Generator().manual_seed(7))

USE_IN_TRANSFORMERS = """
import sys
for name in ("radio_cache", "trainer", "jaxtyping"):
    sys.modules[name] = None
import numpy as np, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
folder, images, found = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert not model.training
out = model(torch.from_numpy(np.load(images)))
summary, features = AutoModel.from_pretrained(folder, trust_remote_code=True, adaptors=[])(torch.from_numpy(np.load(images)))
assert torch.equal(summary, out["backbone"].summary)
pixels = AutoImageProcessor.from_pretrained(folder)(Image.new("RGB", (200, 100), (255, 0, 0)), return_tensors="np")
assert pixels["pixel_values"].shape == (1, 3, 64, 96), pixels["pixel_values"].shape
assert abs(pixels["pixel_values"][0, 0] - 1).max() < 1e-6
assert abs(pixels["pixel_values"][0, 1]).max() < 1e-6
np.savez(found, summary=out["backbone"].summary.detach(), features=out["backbone"].spatial.detach(),
         **{"clip-a.summary": out["clip-a"].summary.detach(), "sam.b.features": out["sam.b"].spatial.detach()})
"""


def expected_of(run: Path) -> dict[str, Any]:
    with torch.inference_mode():
        return flat_features(load_student(run, adaptors="all")(IMAGES))


def assert_same(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-5, atol=1e-5)


def test_the_command_offers_every_format() -> None:
    assert tuple(FORMATS) == CLI_FORMATS


@pytest.mark.parametrize("student", ["e-radio-tiny", pytest.param("vit-tiny-16", marks=pytest.mark.slow)])
def test_transformers_loads_the_folder_without_radio_cache(make_run, tmp_path: Path, student: str, capfd) -> None:
    run = make_run(student)
    (report,) = export_student(run, tmp_path / "hf", formats=["hf"]).exported
    assert "Loading weights" not in capfd.readouterr().err, "transformers' own progress bar"
    assert report.change < 1e-5
    np.save(tmp_path / "images.npy", IMAGES.numpy())
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    places = [str(tmp_path / name) for name in ("hf", "images.npy", "found.npz")]
    command = [sys.executable, "-P", "-c", USE_IN_TRANSFORMERS, *places]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    expected = expected_of(run)
    with np.load(tmp_path / "found.npz") as found:
        assert len(found.files) == 4
        for name in found.files:
            assert_same(found[name], expected[name])


def test_onnx_runtime_gives_the_students_features_for_any_number_of_images(make_run, tmp_path: Path) -> None:
    import onnxruntime

    run = make_run()
    (report,) = export_student(run, tmp_path / "o", formats=["onnx"]).exported
    assert report.change < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "o/student.onnx"), providers=["CPUExecutionProvider"])
    expected = expected_of(run)
    names = [output.name for output in session.get_outputs()]
    assert names == ["summary", "features", "clip-a.summary", "clip-a.features", "sam.b.features"]
    for images in (1, 5):
        for name, value in zip(names, session.run(None, {"images": IMAGES[:images].numpy()}), strict=True):
            assert_same(value, expected[name][:images])


def test_a_program_of_torch_export_gives_the_students_features_for_any_number_of_images(
    make_run, tmp_path: Path
) -> None:
    run = make_run("vit-tiny-16")
    export_student(run, tmp_path / "p", formats=["torch-export"], adaptors=["sam.b"])
    program = torch.export.load(tmp_path / "p/student.pt2").module()
    expected = expected_of(run)
    for images in (1, 5):
        found = program(IMAGES[:images])
        assert len(found) == 3
        for value, name in zip(found, ("summary", "features", "sam.b.features"), strict=True):
            assert_same(value.detach(), expected[name][:images])


@pytest.mark.parametrize(
    ("student", "strides"), [("e-radio-tiny", [4, 8, 16, 32]), ("vit-tiny-16", [16]), ("timm:resnet10t", [16])]
)
def test_timm_creates_the_model_and_its_feature_maps(
    make_run, tmp_path: Path, student: str, strides: list[int]
) -> None:
    run = make_run(student)
    (report,) = export_student(run, tmp_path / "t", formats=["timm"]).exported
    assert report.change < 1e-5
    expected, place = expected_of(run), f"local-dir:{tmp_path / 't'}"
    maps = timm.create_model(place, pretrained=True, features_only=True).eval()
    assert maps.feature_info.reduction() == strides
    with torch.inference_mode():
        found = maps(IMAGES)
        for one, stride, channels in zip(found, strides, maps.feature_info.channels(), strict=True):
            assert one.shape == (5, channels, 64 // stride, 96 // stride)
        own = found[strides.index(16)]
        assert_same(own.flatten(2).transpose(1, 2), expected["features"])
        whole = timm.create_model(place, pretrained=True).eval()
        assert_same(whole(IMAGES), expected["summary"])
        assert_same(whole.forward_head(whole.forward_features(IMAGES)), expected["summary"])
        classifier = timm.create_model(place, pretrained=True, num_classes=3).eval()
        assert classifier(IMAGES).shape == (5, 3)
        assert_same(classifier.forward_head(classifier.forward_features(IMAGES), pre_logits=True), expected["summary"])


def test_the_package_in_a_timm_folder_registers_the_model_without_radio_cache(make_run, tmp_path: Path) -> None:
    export_student(make_run("vit-tiny-16"), tmp_path / "t", formats=["timm"])
    code = (
        "import sys\nfor name in ('radio_cache', 'trainer', 'jaxtyping'): sys.modules[name] = None\n"
        f"import timm; sys.path.insert(0, {str(tmp_path / 't')!r}); import radio_student_for_timm\n"
        f"model = timm.create_model('local-dir:{tmp_path / 't'}', pretrained=True, features_only=True, out_indices=(0, 2))\n"
        "import torch; print([tuple(one.shape) for one in model.eval()(torch.rand(2, 3, 32, 48))])"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=os.environ | {"PYTHONPATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "[(2, 24, 2, 3), (2, 24, 2, 3)]", result.stderr[-2000:]


def test_several_formats_at_once_get_a_folder_each_and_the_command_says_how_they_are_used(
    make_run, tmp_path: Path
) -> None:
    run, out = make_run(), tmp_path / "out"
    formats = ["--format", "safetensors", "--format", "torch-export"]
    result = CliRunner().invoke(export_main, ["--run", str(run), "--out", str(out), *formats, "--adaptor", "sam.b"])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["safetensors", "torch-export"]
    assert "batch norms and position biases folded: features change by at most" in result.output
    assert f"model = load_student('{out}/safetensors', adaptors=['sam.b'])" in result.output
    assert "takes any number of images of 64 x 96 pixels" in result.output
    with torch.inference_mode():
        out_all = flat_features(load_student(out / "safetensors", adaptors="all")(IMAGES))
    assert_same(out_all["clip-a.summary"], expected_of(run)["clip-a.summary"])


def test_what_is_carried_away_is_folded_and_cannot_be_told_from_the_student(make_run, tmp_path: Path) -> None:
    report = export_student(make_run(), tmp_path / "out", formats=["torch-export"])
    assert report.folding is not None
    assert report.folding < 1e-5
    program = torch.export.load(tmp_path / "out/student.pt2")
    assert not [name for name in program.state_dict if "running_mean" in name]
    assert export_student(make_run("vit-tiny-16"), tmp_path / "vit", formats=["torch-export"]).folding is None


def test_what_a_format_cannot_do_is_said_and_leaves_nothing_behind(make_run, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ExportError, match=r"no export format is called 'onx'. Did you mean 'onnx'"):
        export_student(make_run(), tmp_path / "out", formats=["onx"])
    monkeypatch.syspath_prepend(Path(__file__).parent)
    Path(tmp_path / "my_net.py").write_text(
        "from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self): super().__init__(nn.Conv2d(3, 4, 16, 16))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = make_run("torch-module:my_net:Net", {"preferred_resolution": (64, 96)})
    for file_format in ("hf", "timm"):
        with pytest.raises(ExportError, match="your own package, which the folder cannot carry; choose safetensors"):
            export_student(run, tmp_path / "out", formats=["safetensors", file_format], allow_modules=["my_net"])
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    with pytest.raises(NotACacheError, match="exists and is not empty"):
        export_student(run, tmp_path / "full", allow_modules=["my_net"])
    assert (tmp_path / "full/file").read_text() == "mine"


def test_folders_that_are_not_of_this_export_are_left_alone(make_run, tmp_path: Path) -> None:
    mine = tmp_path / "out.partial"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    export_student(make_run("vit-tiny-16"), tmp_path / "out")
    assert (mine / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial", "run"]


@pytest.mark.parametrize("formats", [["safetensors"], ["safetensors", "torch-export"]])
def test_of_two_exports_to_one_place_one_wins_and_the_other_says_so(
    make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, formats: list[str]
) -> None:
    from trainer import exports

    run, write = make_run("vit-tiny-16"), exports.write_safetensors

    def while_another_exports(model: Any, folder: Path) -> Any:
        monkeypatch.setitem(exports.FORMATS, "safetensors", write)
        export_student(run, tmp_path / "out", formats=formats)
        return write(model, folder)

    monkeypatch.setitem(exports.FORMATS, "safetensors", while_another_exports)
    with pytest.raises(NotACacheError, match="was filled by another process meanwhile and was not touched"):
        export_student(run, tmp_path / "out", formats=formats)
    weights = list((tmp_path / "out").rglob("student.safetensors"))
    assert [file.parent.name for file in weights] == ["out" if len(formats) == 1 else "safetensors"]
    load_student(weights[0].parent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_an_empty_folder_and_a_link_to_one_are_filled(make_run, tmp_path: Path) -> None:
    run = make_run("vit-tiny-16")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (report,) = export_student(run, tmp_path / "link").exported
    assert report.folder == tmp_path / "link"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty/student.json").exists()


def test_checksums_of_all_files_lie_beside_them(make_run, tmp_path: Path) -> None:
    export_student(make_run("vit-tiny-16"), tmp_path / "out", formats=["timm"])
    sums = (tmp_path / "out/SHA256SUMS").read_text()
    assert " model.safetensors\n" in sums
    assert "README.md" not in sums
    check = ["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"]
    assert subprocess.run(check, cwd=tmp_path / "out", capture_output=True, check=False).returncode == 0
    (tmp_path / "out/config.json").write_text("{}")
    assert subprocess.run(check, cwd=tmp_path / "out", capture_output=True, check=False).returncode == 1


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_full_disk_is_named_and_nothing_of_the_export_is_left(
    make_run, small_disk, tmp_path: Path, file_format: str
) -> None:
    run = make_run("vit-tiny-16")
    disk = small_disk(40 << 10)
    arguments = ["--run", str(run), "--out", str(disk.path / "out"), "--format", file_format, "--no-picture"]
    result = CliRunner().invoke(export_main, arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), "a traceback"
    assert "No space left on device" in result.output
    assert "free some space" in result.output
    assert list(disk.path.iterdir()) == []


def test_what_a_library_raises_is_one_sentence(make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer import exports

    def failing(model: Any, folder: Path) -> Any:
        raise RuntimeError("the library's own words\nand many more")

    monkeypatch.setitem(exports.FORMATS, "safetensors", failing)
    with pytest.raises(
        ExportError, match=r"--format safetensors cannot be written: RuntimeError: the library's own words\. "
    ):
        export_student(make_run("vit-tiny-16"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_format_whose_library_is_missing_says_what_to_install(make_run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        ExportError, match=r"the format onnx needs onnxscript, which is not installed: pip install onnxscript$"
    ):
        export_student(make_run(), tmp_path / "out", formats=["onnx"])


def test_a_file_that_gives_other_features_is_not_left_for_anybody_to_use(make_run, tmp_path: Path, monkeypatch) -> None:
    from trainer import exports

    def wrong(model: Any, folder: Path) -> Any:
        written = exports.write_safetensors(model, folder)
        run = written.run
        return exports.Written(written.use, lambda images: {k: v + 0.1 for k, v in run(images).items()})

    monkeypatch.setitem(exports.FORMATS, "safetensors", wrong)
    with pytest.raises(ExportError, match="its features differ from those of 'e-radio-tiny'"):
        export_student(make_run(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
