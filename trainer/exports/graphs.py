"""Formats that hold a graph and no code: ONNX, and a program of torch.export. Batches of any size, images of one size."""

import functools
import io
import json
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from radio_cache.local_storage import write_atomically
from trainer.distilled import DistilledStudent
from trainer.exports.libraries import library
from trainer.exports.preprocessing import view_settings, write_prepare_file
from trainer.exports.written import PLACE, ExportError, FlatFeatures, FlatStudent, Written

ONNX_FILE, PROGRAM_FILE = "student.onnx", "student.pt2"
VIEW_KEY = "radio_cache.view"
"""Key of the ONNX file's metadata whose value is JSON: the arguments of `trainer.eval_view.prepare`."""


def write_onnx(model: DistilledStudent, folder: Path) -> Written:
    """`student.onnx`: input `images`, outputs as in `FlatFeatures`. Raises ExportError for what ONNX has no operator for."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        library(name, "the format onnx")
    import onnxruntime

    flat = FlatStudent(model).eval()
    path = folder / ONNX_FILE
    program = _program(flat, model, "onnx")
    try:
        onnx_program = cast(Any, torch.onnx).export(
            program, input_names=["images"], output_names=list(flat.names), verbose=False, optimize=True,
        )  # fmt: skip
    except Exception as exc:  # the converter's errors have no common base
        raise ExportError(f"--format onnx: '{model.config.student}' cannot be converted: {_first_line(exc)}") from exc
    onnx_program.model.metadata_props[VIEW_KEY] = json.dumps(view_settings(model.config))
    onnx_program.save(str(path), external_data=_bytes_of(model) > 1.9e9)

    @functools.cache
    def load() -> Any:
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Float[Tensor, "b 3 h w"]) -> FlatFeatures:
        found = load().run(list(flat.names), {"images": images.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(flat.names, found, strict=True)}

    prepare = write_prepare_file(model, folder)
    return Written(
        use=(
            f"import sys, onnxruntime; sys.path.insert(0, '{PLACE}')",
            *prepare,
            f"session = onnxruntime.InferenceSession('{PLACE}/{ONNX_FILE}')",
            "summary, features = session.run(['summary', 'features'], {'images': images})",
        ),
        run=run,
        notes=(_one_size(model),),
    )


def write_program(model: DistilledStudent, folder: Path) -> Written:
    """`student.pt2`, a program that `torch.export.load` reads; its outputs are those of `FlatStudent`, in order."""
    flat = FlatStudent(model).eval()
    path = folder / PROGRAM_FILE
    archive = io.BytesIO()  # torch's own writer ends the process where the disk is full
    torch.export.save(_program(flat, model, "torch-export"), archive)
    write_atomically(path, archive.getbuffer())

    @functools.cache
    def load() -> torch.nn.Module:
        return torch.export.load(path).module()

    def run(images: Float[Tensor, "b 3 h w"]) -> FlatFeatures:
        return dict(zip(flat.names, load()(images), strict=True))

    prepare = write_prepare_file(model, folder)
    return Written(
        use=(
            f"import sys, torch; sys.path.insert(0, '{PLACE}')",
            *prepare,
            f"model = torch.export.load('{PLACE}/{PROGRAM_FILE}').module()",
            f"{', '.join(name.replace('.', '_').replace('-', '_') for name in flat.names)} = model(torch.from_numpy(images))",
        ),
        run=run,
        notes=(_one_size(model),),
    )


def _program(flat: FlatStudent, model: DistilledStudent, what: str) -> torch.export.ExportedProgram:
    # Two images: of one, the exporter would take the batch for a constant.
    images = torch.zeros(2, 3, *model.config.image_hw)
    batch = torch.export.Dim("batch", min=1, max=65_536)
    try:
        with torch.no_grad():
            return torch.export.export(flat, (images,), dynamic_shapes=({0: batch},))
    except Exception as exc:  # whatever a network of timm or of the user may do
        raise ExportError(f"--format {what}: '{model.config.student}' cannot be traced: {_first_line(exc)}") from exc


def _one_size(model: DistilledStudent) -> str:
    h, w = model.config.image_hw
    return f"takes any number of images of {h} x {w} pixels, and no other size"


def _bytes_of(model: DistilledStudent) -> int:
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def _first_line(exc: Exception) -> str:
    return next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
