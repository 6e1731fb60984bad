"""One photo, prepared as each export says, is the same pixels everywhere."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import timm
import torch
from numpy.typing import NDArray
from PIL import Image

from evals.encoders.onnx_model import OnnxEncoder, open_onnx
from evals.encoders.student import StudentEncoder
from evals.errors import EvalError
from trainer import load_student
from trainer.exports import Card, export_student
from trainer.model.eval_view import eval_pixels, prepare, resized_px

# Widths and heights whose centre crop lies at a whole, an even half, and an odd half of a pixel.
SIZES = [
    (640, 427),
    (451, 300),
    (300, 451),
    (512, 512),
    (97, 640),
    (64, 64),
    (50, 40),
    (131, 100),
    (133, 100),
    (135, 100),
]


def photo(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(skimage.data.rocket()).resize(size)


@pytest.fixture(scope="module")
def pixels_of_exports(tmp_path_factory: pytest.TempPathFactory):
    """pixels_of_exports(make_run, fit, share) -> consumer -> photo -> (3, h, w) in grey levels; exports are made once."""
    made: dict[tuple[str, float], dict[str, object]] = {}

    def make(make_run, fit: str, share: float) -> dict[str, object]:
        if (fit, share) not in made:
            run = make_run("vit-tiny-16", image_hw=(64, 64), fit=fit, centre_share=share)
            out = tmp_path_factory.mktemp("exports") / "out"
            formats = ["safetensors", "hf", "timm", "onnx"]
            export_student(run, out, formats=formats, card=Card(pictures=()))
            made[fit, share] = consumers(out)
        return made[fit, share]

    return make


def consumers(out: Path) -> dict[str, object]:
    import transformers

    from trainer.carried import timm_radio_student

    assert timm_radio_student.RadioStudent
    student = load_student(out / "safetensors")
    encoder = StudentEncoder.of_run(out / "safetensors", name="s", trained=True, device=torch.device("cpu"))
    onnx = OnnxEncoder(open_onnx(out / "onnx/student.onnx", gpu=False), out / "onnx/student.onnx", name="o")
    network = timm.create_model(f"local-dir:{out / 'timm'}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=network))
    processor = transformers.AutoImageProcessor.from_pretrained(out / "hf")
    backend = {"backend": "pil"} if student.config.fit == "squash" else {}
    pillow = transformers.AutoImageProcessor.from_pretrained(out / "hf", **backend)
    view = student.config
    arguments = {"image_hw": view.image_hw, "fit": view.fit, "centre_share": view.centre_share}
    return {
        "load_student": lambda image: student.preprocess(image)[0].numpy() * 255,
        "radio-eval": lambda image: encoder.pixels_of(image).transpose(2, 0, 1),
        "radio-eval of onnx": lambda image: onnx.pixels_of(image).transpose(2, 0, 1),
        "onnx": lambda image: prepare(image, **arguments)[0] * 255,
        "timm": lambda image: transform(image).numpy() * 255,
        "hf, as its card says": lambda image: pillow(image, return_tensors="pt")["pixel_values"][0].numpy() * 255,
        "hf": lambda image: processor(image, return_tensors="pt")["pixel_values"][0].numpy() * 255,
    }


@pytest.mark.parametrize(
    ("fit", "share"), [("squash", 1.0), ("crop", 1.0), ("crop", 0.875), ("crop", 0.9), ("crop", 64 / 73)]
)
def test_every_consumer_of_an_export_sees_the_same_pixels(make_run, pixels_of_exports, fit: str, share: float) -> None:
    views = pixels_of_exports(make_run, fit, share)
    for size in SIZES:
        image = photo(size)
        expected: NDArray[np.float32] = views["load_student"](image)
        assert expected.shape == (3, 64, 64)
        for name, view in views.items():
            # transformers resizes squashed images in torch, whose bicubic filter rounds otherwise than Pillow's.
            most = 2.5 if (name, fit) == ("hf", "squash") else 1e-3
            assert np.abs(view(image).astype(np.float32) - expected).max() < most, (name, size)


def test_the_share_decides_what_is_seen(make_run, pixels_of_exports) -> None:
    image = photo((640, 427))
    views = [
        pixels_of_exports(make_run, *one)["timm"](image) for one in (("squash", 1.0), ("crop", 1.0), ("crop", 0.875))
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(views[one] - views[other]).mean() > 3


@pytest.mark.parametrize("side", [32, 64, 96, 224, 336, 378, 448, 518])
def test_timm_and_transformers_resize_to_the_same_number_of_pixels(make_run, side: int) -> None:
    from trainer.exports.preprocessing import timm_pretrained_cfg

    config = load_student(make_run("vit-tiny-16")).config
    for resized in range(side, side + 90):
        share = side / resized
        one = replace(config, image_hw=(side, side), fit="crop", centre_share=share)
        assert resized_px((side, side), share) == resized
        assert int(side / timm_pretrained_cfg(one)["crop_pct"]) == resized


def test_the_lines_on_the_card_of_an_onnx_file_run_without_radio_cache_and_give_the_students_features(
    make_run, tmp_path: Path
) -> None:
    run = make_run("vit-tiny-16", image_hw=(64, 64), fit="crop", centre_share=0.875)
    (report,) = export_student(run, tmp_path / "o", formats=["onnx"], card=Card(pictures=())).exported
    photo((640, 427)).save(tmp_path / "photo.jpg", quality=95)
    lines = "\n".join(report.written.use).replace("photo.jpg", str(tmp_path / "photo.jpg"))
    code = (
        "import sys\nfor name in ('radio_cache', 'trainer', 'jaxtyping', 'torch'): sys.modules[name] = None\n"
        f"{lines}\nimport numpy as np; np.save({str(tmp_path / 'summary.npy')!r}, summary)"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr[-2000:]
    student = load_student(run)
    with torch.inference_mode():
        expected = student(student.preprocess(Image.open(tmp_path / "photo.jpg"))).summary
    np.testing.assert_allclose(np.load(tmp_path / "summary.npy"), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_photos_of_other_modes_and_turned_ones_are_prepared_upright_in_rgb() -> None:
    image = photo((90, 60))
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    turned.info["exif"] = exif.tobytes()
    view = {"image_hw": (32, 32), "fit": "crop", "centre_share": 1.0}
    np.testing.assert_array_equal(prepare(turned, **view), prepare(image, **view))
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        assert prepare(image.convert(mode), **view).shape == (1, 3, 32, 32)
    wide = eval_pixels(image, image_hw=(32, 64), fit="crop", centre_share=1.0)
    assert wide.shape == (32, 64, 3)


@pytest.mark.parametrize("heads", ["all", []])
def test_the_pipeline_of_transformers_gives_the_students_summary(make_run, tmp_path: Path, heads) -> None:
    import transformers

    run = make_run("vit-tiny-16", image_hw=(64, 64), fit="crop")
    export_student(run, tmp_path / "hf", formats=["hf"], adaptors=heads, card=Card(pictures=()))
    from trainer.carried.modeling_radio_student import RadioStudentModel

    model = RadioStudentModel.from_pretrained(tmp_path / "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    pipe = transformers.pipeline("image-feature-extraction", model=model, image_processor=processor)
    image = photo((640, 427))
    found = pipe(image)
    student = load_student(run)
    with torch.inference_mode():
        expected = student(student.preprocess(image))
    np.testing.assert_allclose(np.array(found), expected.summary.numpy(), rtol=1e-4, atol=1e-5)
    if heads:
        np.testing.assert_allclose(np.array(pipe(image, pool=True)), expected.summary.numpy(), rtol=1e-4, atol=1e-5)
        out = model(student.preprocess(image))
        assert torch.allclose(out["last_hidden_state"], expected.spatial, atol=1e-5)
        assert out["clip-a"].summary.shape == (1, 6)


def test_an_onnx_file_whose_view_is_damaged_is_refused(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from trainer.exports.graphs import VIEW_KEY

    for text in ("{", "[]", json.dumps({"fit": "stretch"}), json.dumps({"centre_share": 0.0})):
        session = SimpleNamespace(
            get_inputs=lambda: [SimpleNamespace(name="images", shape=["n", 3, 32, 32])],
            get_modelmeta=lambda text=text: SimpleNamespace(custom_metadata_map={VIEW_KEY: text}),
        )
        with pytest.raises(EvalError, match=r"metadata .radio_cache\.view. is damaged"):
            OnnxEncoder(session, tmp_path / "x.onnx", name="x")
