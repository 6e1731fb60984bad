"""Encoder of an exported ONNX file, run by ONNX Runtime."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, final

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from evals.encoders.base import OWN, LiveEncoder, Outputs, size_phrase
from evals.errors import EvalError
from radio_cache.errors import ConfigError
from radio_cache.format.strict_json import from_json, parse_json
from radio_cache.geometry.crops import BoxXYXY, ViewGeometry
from trainer.data.crops import eval_box_xyxy
from trainer.exports.graphs import VIEW_KEY
from trainer.model.eval_view import StudentFit, eval_pixels


class OnnxSession(Protocol):
    """The used part of `onnxruntime.InferenceSession`."""

    def get_inputs(self) -> list[Any]:
        """Return name, shape and type of every input."""
        ...

    def get_outputs(self) -> list[Any]:
        """Return name, shape and type of every output."""
        ...

    def run(self, output_names: list[str] | None, input_feed: dict[str, NDArray[np.float32]]) -> list[Any]:
        """Return the outputs for these inputs."""
        ...


@dataclass(frozen=True)
class View:
    """The part of an image that the student of a file sees (`trainer.model.eval_view.eval_pixels`)."""

    image_hw: tuple[int, int] = (0, 0)
    fit: StudentFit = "squash"
    centre_share: float = 1.0
    step: int = 1
    """Sides of its input are multiples of this, pixels."""


_MAX_PIXELS = 1 << 26
"""Largest input: 8192 x 8192."""


def _recorded_view(session: OnnxSession, path: Path) -> View:
    """Read the view from the file's metadata. Raises EvalError if it is damaged."""
    # Sessions of other runtimes and of tests have no metadata.
    read = getattr(session, "get_modelmeta", None)
    text: str | None = None if read is None else read().custom_metadata_map.get(VIEW_KEY)
    if text is None:
        return View()
    try:
        view = from_json(View, parse_json(text.encode()))
    except ValueError as exc:
        raise EvalError(f"{path}: its metadata '{VIEW_KEY}' is damaged ({exc}): export the student again") from exc
    if not 0 < view.centre_share <= 1 or view.step < 1:
        raise EvalError(
            f"{path}: its metadata '{VIEW_KEY}' is damaged (centre_share is {view.centre_share}, step {view.step}): export the "
            "student again"
        )
    return view


def _refuse_size(path: Path, input_hw: tuple[int, int], step: int) -> None:
    """Raise an error if the file does not take, or should not be given, input of this size."""
    h, w = input_hw
    if min(h, w) < 1 or h * w > _MAX_PIXELS:
        raise EvalError(
            f"{path}: images of {size_phrase(input_hw)} are not evaluated, only of 1 to {_MAX_PIXELS} pixels in all"
        )
    if h % step or w % step:
        nearest = max(step, round(h / step) * step), max(step, round(w / step) * step)
        raise ConfigError(
            f"{path} takes images whose sides are multiples of {step} px, not {size_phrase(input_hw)}; the nearest is "
            f"{size_phrase(nearest)}"
        )


def open_onnx(path: Path, *, gpu: bool) -> OnnxSession:
    """Open a file in ONNX Runtime.

    Args:
        path: of the file.
        gpu: prefer CUDA.

    Raises:
        EvalError: if ONNX Runtime is not installed, or cannot load the file.
    """
    try:
        runtime: Any = import_module("onnxruntime")
    except ModuleNotFoundError as exc:
        raise EvalError(f"{path} needs ONNX Runtime, which is not installed: pip install onnxruntime") from exc
    # ONNX Runtime takes the first provider that is available, so the CPU remains as a fallback.
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"] if gpu else ["CPUExecutionProvider"]
    try:
        return runtime.InferenceSession(str(path), providers=providers)
    except Exception as exc:  # its exceptions have no common base
        raise EvalError(f"{path} cannot be loaded by ONNX Runtime: {str(exc).splitlines()[0]}") from exc


@final
class OnnxEncoder(LiveEncoder):
    """An ONNX file with one input of RGB images (b, 3, h, w) in [0, 1].

    Its first output of two axes is the summary; the first of three (b, n, c) or four axes (b, c, h, w) is the map. Files of
    `radio-export` record which part of an image they see. For other files, the whole image is squashed to the input.

    Args:
        session: of the file.
        path: of the file.
        name: of its rows in tables.
        size_px: side of the square input, where the file leaves it open.

    Raises:
        EvalError: for a file of another kind.
        ConfigError: for a size that the file does not take.
    """

    def __init__(self, session: OnnxSession, path: Path, *, name: str, size_px: int | None = None) -> None:
        inputs = session.get_inputs()
        shape = list(inputs[0].shape) if inputs else []
        if len(inputs) != 1 or len(shape) != 4 or shape[1] != 3:
            raise EvalError(
                f"{path} takes {[tensor.shape for tensor in inputs]}, expected is one input (batch, 3, h, w)"
            )
        # A dimension of an exported graph is a number if it is fixed, a name if it is free.
        fixed = (shape[2], shape[3]) if isinstance(shape[2], int) and isinstance(shape[3], int) else None
        view = _recorded_view(session, path)
        if fixed is not None and size_px is not None and fixed != (size_px, size_px):
            raise ConfigError(f"{path} takes {size_phrase(fixed)} and nothing else, not {size_px} px")
        # (0, 0) stands for a file that records no size.
        recorded = view.image_hw if min(view.image_hw) > 0 else None
        input_hw = fixed or (recorded if size_px is None else (size_px, size_px))
        if input_hw is None:
            raise ConfigError(f"{path} takes images of any size: give one, as in {path}@224")
        _refuse_size(path, input_hw, view.step)
        self._session, self._path, self._view = session, path, view
        self._input = str(inputs[0].name)
        # Some exporters fix the batch as well as the size.
        self._fixed_batch = shape[0] if isinstance(shape[0], int) else None
        super().__init__(
            name=name, kind="model", description=f"ONNX {path.name}, {size_phrase(input_hw)}", spaces=(OWN,)
        )
        # The declared shapes may be symbolic: one run on zeros shows what the outputs are.
        outputs = self._run_session(np.zeros((self._fixed_batch or 1, 3, *input_hw), np.float32))
        vectors = [number for number, output in enumerate(outputs) if output.ndim == 2]
        maps = [number for number, output in enumerate(outputs) if output.ndim in (3, 4)]
        if not vectors and not maps:
            raise EvalError(f"{path} gives {[output.shape for output in outputs]}: none of them is a summary or a map")
        # The first output of each kind: an export lists the backbone before its heads.
        self._summary, self._map = (vectors or [None])[0], (maps or [None])[0]
        self.spaces = (OWN,) if self._summary is not None else ()
        self.map_spaces = (OWN,) if self._map is not None else ()
        grid_hw = (1, 1) if self._map is None else self._grid_hw(outputs[self._map], input_hw)
        stride = input_hw[0] / grid_hw[0]
        self.geometry = ViewGeometry(
            fit="squash",
            input_hw=input_hw,
            resize_px=min(input_hw),
            interpolation="bicubic",
            grid_hw=grid_hw,
            stride_px=stride,
            offset_px=stride / 2,
        )

    def pixels_of(self, image: Image.Image) -> NDArray[np.uint8]:
        """Return the recorded view of the image."""
        view = self._view
        return eval_pixels(image, image_hw=self.geometry.input_hw, fit=view.fit, centre_share=view.centre_share)

    def seen_box_xyxy(self, image_hw: tuple[int, int]) -> BoxXYXY:
        """Return the box of the recorded view; the whole image for "squash"."""
        box = eval_box_xyxy(image_hw, self._view.fit, self._view.centre_share)
        return box or (0.0, 0.0, float(image_hw[1]), float(image_hw[0]))

    def outputs(self, pixels: UInt8[Tensor, "b h w 3"], images_hw: list[tuple[int, int]] | None = None) -> Outputs:
        """Run the session on images in [0, 1]; normalisation is part of the file."""
        del images_hw  # there is no padding
        # (b, h, w, 3) -> (b, 3, h, w)
        images = pixels.cpu().permute(0, 3, 1, 2).float().div(255.0).numpy()
        session_outputs = self._in_batches(np.ascontiguousarray(images))
        summaries = {} if self._summary is None else {OWN: torch.from_numpy(session_outputs[self._summary]).float()}
        if self._map is None:
            return Outputs(summaries, {})
        map_output = torch.from_numpy(session_outputs[self._map]).float()
        # (b, c, h, w) or (b, n, c) -> (b, h, w, c)
        maps = (
            map_output.permute(0, 2, 3, 1) if map_output.ndim == 4 else map_output.unflatten(1, self.geometry.grid_hw)
        )
        return Outputs(summaries, {OWN: maps})

    def at_size(self, size_px: int) -> "OnnxEncoder":
        """Return the same file for another input size, if it leaves the size open."""
        return OnnxEncoder(self._session, self._path, name=self.name, size_px=size_px)

    def _in_batches(self, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Run in batches of the size that the file is fixed to, the last one filled up; all at once if it is not fixed."""
        size = self._fixed_batch or len(images)
        parts: list[list[NDArray[np.float32]]] = []
        for first in range(0, len(images), size):
            part = images[first : first + size]
            # Repeating the last image fills the batch; its copies are cut off again.
            filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            parts.append([output[: len(part)] for output in self._run_session(filled)])
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]

    def _run_session(self, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        try:
            return [np.asarray(output) for output in self._session.run(None, {self._input: images})]
        except Exception as exc:  # ONNX Runtime's exceptions have no common base
            raise EvalError(f"{self._path} cannot run on images {images.shape}: {str(exc).splitlines()[0]}") from exc

    def _grid_hw(self, output: NDArray[np.float32], input_hw: tuple[int, int]) -> tuple[int, int]:
        """Return the grid of a map; that of a token sequence (b, n, c) has the aspect ratio of the input."""
        if output.ndim == 4:
            return int(output.shape[2]), int(output.shape[3])
        # n = h * w tokens in the aspect ratio of the input: h = sqrt(n * height / width).
        tokens = output.shape[1]
        h = round((tokens * input_hw[0] / input_hw[1]) ** 0.5)
        if h == 0 or tokens % h or h * input_hw[1] != tokens // h * input_hw[0]:
            raise EvalError(f"{self._path} gives {tokens} tokens for {size_phrase(input_hw)}, which are no grid")
        return h, tokens // h
