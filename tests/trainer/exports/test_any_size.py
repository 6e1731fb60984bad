"""Graphs for images of any size: right at sizes they were not traced with, and an error where the student gives one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from evals.encoders.onnx_model import OnnxEncoder, open_onnx
from radio_cache.errors import ConfigError
from trainer import load_student
from trainer.export_cli import main as export_main
from trainer.exports import Card, ExportError, export_student
from trainer.exports.written import flat_features

NO_PICTURE = Card(pictures=())


@pytest.mark.parametrize("student", ["vit-tiny-16", "timm:resnet10t"])
def test_onnx_of_any_size_gives_the_students_features_and_refuses_what_the_student_refuses(
    make_run, tmp_path: Path, student: str
) -> None:
    run = make_run(student)
    (report,) = export_student(run, tmp_path / "o", formats=["onnx"], any_size=True, card=NO_PICTURE).exported
    assert "multiples of 16 pixels, and refuses others" in report.written.notes[0]
    session = open_onnx(tmp_path / "o/student.onnx", gpu=False)
    assert [str(size) for size in session.get_inputs()[0].shape[2:]] == ["height", "width"]
    model = load_student(run, adaptors="all")
    for h, w in ((16, 16), (16, 160), (160, 48), (64, 96), (96, 96)):
        images = torch.rand(2, 3, h, w)
        with torch.inference_mode():
            expected = flat_features(model(images))
        names = [output.name for output in session.get_outputs()]
        for name, value in zip(names, session.run(None, {"images": images.numpy()}), strict=True):
            np.testing.assert_allclose(value, expected[name].numpy(), rtol=1e-3, atol=1e-4)
    for h, w in ((170, 175), (160, 175), (170, 160), (8, 16), (161, 161)):
        with pytest.raises(Exception, match="image_height_and_width_must_be_multiples_of_16_pixels"):
            session.run(None, {"images": np.zeros((1, 3, h, w), np.float32)})


def test_radio_eval_takes_such_a_file_at_its_own_size_or_another_and_names_the_nearest(
    make_run, tmp_path: Path
) -> None:
    file = tmp_path / "o/student.onnx"
    export_student(make_run("vit-tiny-16"), tmp_path / "o", formats=["onnx"], any_size=True, card=NO_PICTURE)
    session = open_onnx(file, gpu=False)
    assert OnnxEncoder(session, file, name="o").geometry.input_hw == (64, 96)
    assert OnnxEncoder(session, file, name="o", size_px=128).geometry.grid_hw == (8, 8)
    with pytest.raises(ConfigError, match="multiples of 16 px, not 170 px; the nearest is 176 px"):
        OnnxEncoder(session, file, name="o", size_px=170)


def test_a_student_that_cannot_is_refused_with_the_way_that_works(make_run, tmp_path: Path) -> None:
    run = make_run("e-radio-tiny")
    with pytest.raises(ExportError, match="cannot be traced for images of any size: leave out --any-size"):
        export_student(run, tmp_path / "o", formats=["onnx"], any_size=True, card=NO_PICTURE)
    assert not (tmp_path / "o").exists()
    arguments = ["--run", str(run), "--out", str(tmp_path / "o"), "--any-size", "--format", "hf"]
    result = CliRunner().invoke(export_main, arguments)
    assert result.exit_code == 1
    assert "any size is for the format onnx" in result.output
