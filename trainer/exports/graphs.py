"""Formats that hold a graph and no code: ONNX, and a program of torch.export.

Batches of any size; images of the size trained at, or in ONNX of any size that the student takes, which the graph checks.
"""

import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from radio_cache.storage.local import write_atomically
from trainer.exports.libraries import library
from trainer.exports.preprocessing import view_settings, write_prepare_file
from trainer.exports.written import (
    PLACE,
    TOLERANCE,
    ExportError,
    FlatFeatures,
    FlatStudent,
    Written,
    flat_features,
    largest_change,
)
from trainer.model.student import DistilledStudent

ONNX_FILE, PROGRAM_FILE = "student.onnx", "student.pt2"
VIEW_KEY = "radio_cache.view"
"""Key of the ONNX file's metadata whose value is JSON: the arguments of `trainer.model.eval_view.prepare`."""


def write_onnx(model: DistilledStudent, folder: Path, *, any_size: bool = False) -> Written:
    """Write `student.onnx`: input `images`, outputs as in `FlatFeatures`.

    Args:
        model: the student.
        folder: of the export.
        any_size: accept images of any size that the student accepts; others are errors.

    Raises:
        ExportError: if ONNX lacks an operator, or the student cannot be traced for any size.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        library(name, "the format onnx")
    import onnxruntime

    flat = FlatStudent(model).eval()
    path = folder / ONNX_FILE
    program = _program(flat, model, "onnx", any_size)
    try:
        onnx_program = cast(Any, torch.onnx).export(
            program,
            input_names=["images"],
            output_names=list(flat.names),
            verbose=False,
            optimize=True,
        )
    except Exception as exc:  # the converter's errors have no common base
        raise ExportError(f"--format onnx: '{model.config.student}' cannot be converted: {_first_line(exc)}") from exc
    onnx_program.model.metadata_props[VIEW_KEY] = json.dumps(
        {**view_settings(model.config), "step": model.min_resolution_step}
    )
    # protobuf, which holds the graph, cannot exceed 2 GB: larger weights lie in a file beside it.
    onnx_program.save(str(path), external_data=_bytes_of(model) > 1.9e9)
    if any_size:
        _check_size_in_graph(path, model.min_resolution_step)

    @functools.cache
    def load() -> Any:
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Float[Tensor, "b 3 h w"]) -> FlatFeatures:
        outputs = load().run(list(flat.names), {"images": images.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(flat.names, outputs, strict=True)}

    if any_size:
        _compare_other_sizes(run, model, "onnx")
    prepare = write_prepare_file(model, folder)
    return Written(
        use=(
            f"import sys, onnxruntime; sys.path.insert(0, '{PLACE}')",
            *prepare,
            f"session = onnxruntime.InferenceSession('{PLACE}/{ONNX_FILE}')",
            "summary, features = session.run(['summary', 'features'], {'images': images})",
        ),
        run=run,
        notes=(_sizes(model, any_size),),
    )


def write_program(model: DistilledStudent, folder: Path) -> Written:
    """Write `student.pt2`, a program that `torch.export.load` reads. Its outputs are those of `FlatStudent`, in order."""
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
        notes=(_sizes(model, any_size=False),),
    )


def _program(
    flat: FlatStudent, model: DistilledStudent, what: str, any_size: bool = False
) -> torch.export.ExportedProgram:
    step, (h, w) = model.min_resolution_step, model.config.image_hw
    dynamic: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=65_536)}
    if any_size:
        if model.student.fixed_resolution is not None:
            raise ExportError(f"--any-size: student '{model.config.student}' takes images of one size only")
        # At least two steps, and different sides: the exporter treats sizes of one, or equal sizes, as constants.
        h, w = max(2, h // step) * step, (max(2, w // step) + 1) * step
        most_steps = _LONGEST_PX // step
        dynamic[2] = step * torch.export.Dim("rows", min=1, max=most_steps)
        dynamic[3] = step * torch.export.Dim("columns", min=1, max=most_steps)
    # Two images: the exporter would treat a batch of one as a constant.
    images = torch.zeros(2, 3, h, w)
    try:
        with torch.no_grad():
            return torch.export.export(flat, (images,), dynamic_shapes=(dynamic,), strict=False)
    except Exception as exc:  # a network of timm or of the user may fail in any way
        if any_size:
            raise _not_free(model, what, _first_line(exc)) from exc
        raise ExportError(f"--format {what}: '{model.config.student}' cannot be traced: {_first_line(exc)}") from exc


def _not_free(model: DistilledStudent, what: str, why: str) -> ExportError:
    return ExportError(
        f"--format {what}: '{model.config.student}' cannot be traced for images of any size: leave out --any-size, for a "
        f"graph of the training size ({why:.200})"
    )


_LONGEST_PX = 8192
"""Longest side of images for which a graph of any size is traced."""


def _check_size_in_graph(path: Path, step: int) -> None:
    """Add nodes before the network that fail for sides that are not multiples of `step` pixels.

    ONNX has no assertion, and convolutions would silently ignore the remainder of an image. A Reshape to sides rounded down to
    whole steps changes nothing for legal sides and fails for others. Its name is the message.
    """
    from onnx import TensorProto, helper, load, save

    model = load(str(path), load_external_data=False)
    graph, checked = model.graph, "images_of_whole_steps"
    # All readers of the input read the checked images, so that the check cannot be optimised away.
    for reader in graph.node:
        for index, name in enumerate(reader.input):
            if name == "images":
                reader.input[index] = checked
    prefix = f"image_height_and_width_must_be_multiples_of_{step}_pixels"

    def constant(name: str, values: list[int]) -> Any:
        return helper.make_node(
            "Constant",
            [],
            [f"{prefix}/{name}"],
            value=helper.make_tensor(name, TensorProto.INT64, [len(values)], values),
        )

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> Any:
        return helper.make_node(
            kind,
            [f"{prefix}/{name}" if name != "images" else name for name in inputs],
            [f"{prefix}/{output}"],
            name=f"{prefix}/{output}",
            **attributes,
        )

    nodes = [
        constant("steps", [1, 1, step, step]),
        node("Shape", ["images"], "shape"),
        node("Div", ["shape", "steps"], "whole"),
        node("Mul", ["whole", "steps"], "sides"),
        helper.make_node(
            "Reshape", ["images", f"{prefix}/sides"], [checked], name=prefix, allowzero=1
        ),  # 0 is no wildcard
    ]
    for check_node in reversed(nodes):
        graph.node.insert(0, check_node)
    for axis, label in ((2, "height"), (3, "width")):
        dimension = graph.input[0].type.tensor_type.shape.dim[axis]
        dimension.Clear()
        dimension.dim_param = label
    save(model, str(path))


def _compare_other_sizes(run: Callable[[Tensor], FlatFeatures], model: DistilledStudent, what: str) -> None:
    """Run the exported graph at sizes other than the traced one, one of them illegal.

    Raises:
        ExportError: if its outputs differ from the student's, or if it accepts the illegal size.
    """
    step, (h, w) = model.min_resolution_step, model.config.image_hw
    for rows, columns in ((h // step + 2, w // step), (max(1, h // step - 1), w // step + 3)):
        images = torch.rand(2, 3, rows * step, columns * step, generator=torch.Generator().manual_seed(rows))
        with torch.inference_mode():
            expected = flat_features(model(images))
            try:
                change = largest_change(run(images), expected)
            except Exception as exc:  # a size went into the graph as a constant
                raise _not_free(model, what, _first_line(exc)) from exc
        if not change <= TOLERANCE:
            size = f"at {rows * step} x {columns * step} pixels"
            raise _not_free(model, what, f"{size} it differs by {change:.1e} of the largest value")
    if step == 1:
        return
    try:
        run(torch.zeros(1, 3, h + step // 2, w + step - 1))
    except Exception:  # as it should: in the words of ONNX Runtime or of torch
        return
    raise ExportError(
        f"--format {what} --any-size: what was written takes images that '{model.config.student}' refuses"
    )


def _sizes(model: DistilledStudent, any_size: bool) -> str:
    (h, w), step = model.config.image_hw, model.min_resolution_step
    if any_size:
        return f"takes any number of images whose sides are multiples of {step} pixels, and refuses others; trained at {h} x {w}"
    return f"takes any number of images of {h} x {w} pixels, and no other size"


def _bytes_of(model: DistilledStudent) -> int:
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def _first_line(exc: Exception) -> str:
    return next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
