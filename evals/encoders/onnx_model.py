"""An exported ONNX file as an encoder, run by ONNX Runtime where that is installed."""

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
    """What is used of `onnxruntime.InferenceSession`."""

    def get_inputs(self) -> list[Any]: ...
    def get_outputs(self) -> list[Any]: ...
    def run(self, output_names: list[str] | None, input_feed: dict[str, NDArray[np.float32]]) -> list[Any]: ...


@dataclass(frozen=True)
class View:
    """What a file's student is shown of an image (`trainer.model.eval_view.eval_pixels`)."""

    image_hw: tuple[int, int] = (0, 0)
    fit: StudentFit = "squash"
    centre_share: float = 1.0
    step: int = 1
    """Sides of its input are multiples of, pixels."""


_MAX_PIXELS = 1 << 26
"""Of an input: 8192 x 8192."""


def _recorded_view(session: OnnxSession, path: Path) -> View:
    """Read the view from the file's metadata. Raises EvalError for one that makes no sense."""
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
    """A session of a file. Raises EvalError without ONNX Runtime, or for a file that it cannot load."""
    try:
        runtime: Any = import_module("onnxruntime")
    except ModuleNotFoundError as exc:
        raise EvalError(f"{path} needs ONNX Runtime, which is not installed: pip install onnxruntime") from exc
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"] if gpu else ["CPUExecutionProvider"]
    try:
        return runtime.InferenceSession(str(path), providers=providers)
    except Exception as exc:  # its exceptions have no common base
        raise EvalError(f"{path} cannot be loaded by ONNX Runtime: {str(exc).splitlines()[0]}") from exc


@final
class OnnxEncoder(LiveEncoder):
    """One input of RGB images (b, 3, h, w) in [0, 1]; the first output of two axes is the summary, the first of three
    (b, n, c) or four (b, c, h, w) is the map. A file of `radio-export` says what it is shown of an image; of another, the whole
    image is squashed to the input.

    size_px: of the square input, where the file leaves it open. Raises EvalError for a file of another kind.
    """

    def __init__(self, session: OnnxSession, path: Path, *, name: str, size_px: int | None = None) -> None:
        inputs = session.get_inputs()
        shape = list(inputs[0].shape) if inputs else []
        if len(inputs) != 1 or len(shape) != 4 or shape[1] != 3:
            raise EvalError(f"{path} takes {[one.shape for one in inputs]}, expected is one input (batch, 3, h, w)")
        fixed = (shape[2], shape[3]) if isinstance(shape[2], int) and isinstance(shape[3], int) else None
        view = _recorded_view(session, path)
        if fixed is not None and size_px is not None and fixed != (size_px, size_px):
            raise ConfigError(f"{path} takes {size_phrase(fixed)} and nothing else, not {size_px} px")
        recorded = view.image_hw if min(view.image_hw) > 0 else None
        input_hw = fixed or (recorded if size_px is None else (size_px, size_px))
        if input_hw is None:
            raise ConfigError(f"{path} takes images of any size: say which, as in {path}@224")
        _refuse_size(path, input_hw, view.step)
        self._session, self._path, self._view = session, path, view
        self._input = str(inputs[0].name)
        self._fixed_batch = shape[0] if isinstance(shape[0], int) else None
        super().__init__(name=name, kind="model", about=f"ONNX {path.name}, {size_phrase(input_hw)}", spaces=(OWN,))
        found = self._run_session(np.zeros((self._fixed_batch or 1, 3, *input_hw), np.float32))
        vectors = [number for number, output in enumerate(found) if output.ndim == 2]
        maps = [number for number, output in enumerate(found) if output.ndim in (3, 4)]
        if not vectors and not maps:
            raise EvalError(f"{path} gives {[output.shape for output in found]}: neither a summary nor a map is there")
        self._summary, self._map = (vectors or [None])[0], (maps or [None])[0]
        self.spaces = (OWN,) if self._summary is not None else ()
        self.map_spaces = (OWN,) if self._map is not None else ()
        grid_hw = (1, 1) if self._map is None else self._grid_hw(found[self._map], input_hw)
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
        view = self._view
        return eval_pixels(image, image_hw=self.geometry.input_hw, fit=view.fit, centre_share=view.centre_share)

    def seen_box_xyxy(self, image_hw: tuple[int, int]) -> BoxXYXY:
        box = eval_box_xyxy(image_hw, self._view.fit, self._view.centre_share)
        return box or (0.0, 0.0, float(image_hw[1]), float(image_hw[0]))

    def outputs(self, pixels: UInt8[Tensor, "b h w 3"], images_hw: list[tuple[int, int]] | None = None) -> Outputs:
        del images_hw  # there is no padding
        images = pixels.cpu().permute(0, 3, 1, 2).float().div(255.0).numpy()
        found = self._in_batches(np.ascontiguousarray(images))
        summaries = {} if self._summary is None else {OWN: torch.from_numpy(found[self._summary]).float()}
        if self._map is None:
            return Outputs(summaries, {})
        made = torch.from_numpy(found[self._map]).float()
        maps = made.permute(0, 2, 3, 1) if made.ndim == 4 else made.unflatten(1, self.geometry.grid_hw)
        return Outputs(summaries, {OWN: maps})

    def at_size(self, size_px: int) -> "OnnxEncoder":
        return OnnxEncoder(self._session, self._path, name=self.name, size_px=size_px)

    def _in_batches(self, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Files exported for one batch size get batches of that size, the last one filled up."""
        size = self._fixed_batch or len(images)
        parts: list[list[NDArray[np.float32]]] = []
        for first in range(0, len(images), size):
            part = images[first : first + size]
            filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            parts.append([output[: len(part)] for output in self._run_session(filled)])
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]

    def _run_session(self, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        try:
            return [np.asarray(output) for output in self._session.run(None, {self._input: images})]
        except Exception as exc:  # ONNX Runtime's exceptions have no common base
            raise EvalError(f"{self._path} cannot run on images {images.shape}: {str(exc).splitlines()[0]}") from exc

    def _grid_hw(self, output: NDArray[np.float32], input_hw: tuple[int, int]) -> tuple[int, int]:
        if output.ndim == 4:
            return int(output.shape[2]), int(output.shape[3])
        tokens = output.shape[1]
        h = round((tokens * input_hw[0] / input_hw[1]) ** 0.5)
        if h == 0 or tokens % h or h * input_hw[1] != tokens // h * input_hw[0]:
            raise EvalError(f"{self._path} gives {tokens} tokens for {size_phrase(input_hw)}, which are no grid")
        return h, tokens // h
