"""ONNX files as encoders: what they may take and give. One test runs a real file, where ONNX Runtime is installed."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from evals.encoders.base import OWN
from evals.encoders.onnx_model import OnnxEncoder, open_onnx
from evals.errors import EvalError
from radio_cache.errors import ConfigError

FILE = Path("student.onnx")


class Session:
    """Gives the mean colour as the summary and mean colours of 8 x 8 patches as the map, in the layout asked for."""

    def __init__(self, shape: list[int | str], *, layout: str = "NCHW", outputs: tuple[str, ...] = ("s", "m")) -> None:
        self.shape, self.layout, self.outputs = shape, layout, outputs
        self.batches: list[int] = []

    def get_inputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="images", shape=self.shape)]

    def get_outputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name) for name in self.outputs]

    def run(self, names: None, feed: dict[str, NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        images = feed["images"]
        assert images.dtype == np.float32
        assert images.flags.c_contiguous
        self.batches.append(len(images))
        maps = torch.nn.functional.avg_pool2d(torch.from_numpy(images), 8)
        outputs = {"s": images.mean(axis=(2, 3)), "m": maps.numpy(), "x": np.zeros(3, np.float32)}
        if self.layout == "NLC":
            outputs["m"] = maps.flatten(2).transpose(1, 2).numpy()
        return [outputs[name] for name in self.outputs]


def pixels(count: int, side: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8))


@pytest.mark.parametrize("layout", ["NCHW", "NLC"])
def test_summary_and_map_are_found_by_their_shapes(layout: str) -> None:
    encoder = OnnxEncoder(Session(["n", 3, 16, 24], layout=layout), FILE, name="s")
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8))
    out = encoder.outputs(images)
    expected = images.float().div(255).unflatten(1, (2, 8)).unflatten(3, (3, 8)).mean(dim=(2, 4))
    torch.testing.assert_close(out.maps[OWN], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.summaries[OWN], images.float().div(255).mean(dim=(1, 2)), rtol=1e-4, atol=1e-5)
    assert encoder.geometry.grid_hw == (2, 3)
    assert encoder.description == "ONNX student.onnx, 16 x 24 px"
    assert encoder.pixels_of(Image.new("RGB", (50, 40))).shape == (16, 24, 3)


def test_files_for_one_batch_size_get_batches_of_it() -> None:
    session = Session([4, 3, 16, 16])
    out = OnnxEncoder(session, FILE, name="s").outputs(pixels(6, 16))
    assert session.batches == [4, 4, 4]  # the first one found out what the outputs are
    torch.testing.assert_close(
        out.summaries[OWN], pixels(6, 16).float().div(255).mean(dim=(1, 2)), rtol=1e-4, atol=1e-5
    )


def test_open_sizes_must_be_said_and_fixed_ones_cannot_change() -> None:
    with pytest.raises(ConfigError, match=r"any size: give one, as in student\.onnx@224"):
        OnnxEncoder(Session(["n", 3, "h", "w"]), FILE, name="s")
    encoder = OnnxEncoder(Session(["n", 3, "h", "w"]), FILE, name="s", size_px=32)
    assert encoder.at_size(64).geometry.grid_hw == (8, 8)
    with pytest.raises(ConfigError, match="takes 16 px and nothing else, not 32 px"):
        OnnxEncoder(Session(["n", 3, 16, 16]), FILE, name="s").at_size(32)


def test_files_of_another_kind_are_refused() -> None:
    with pytest.raises(EvalError, match="expected is one input"):
        OnnxEncoder(Session(["n", 77]), FILE, name="s")
    with pytest.raises(EvalError, match="none of them is a summary or a map"):
        OnnxEncoder(Session(["n", 3, 16, 16], outputs=("x",)), FILE, name="s")
    only_maps = OnnxEncoder(Session(["n", 3, 16, 16], outputs=("m",)), FILE, name="s")
    assert (only_maps.spaces, only_maps.map_spaces) == ((), (OWN,))


def test_without_the_runtime_the_cure_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("evals.encoders.onnx_model.import_module", missing)
    with pytest.raises(EvalError, match="pip install onnxruntime"):
        open_onnx(tmp_path / "a.onnx", gpu=False)


def test_a_damaged_file_is_refused_by_the_real_runtime(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed here")
    (tmp_path / "a.onnx").write_bytes(b"nothing")
    with pytest.raises(EvalError, match="cannot be loaded by ONNX Runtime"):
        open_onnx(tmp_path / "a.onnx", gpu=False)


@pytest.mark.parametrize("side", [10**6, 0, 10**9])
def test_an_absurd_input_is_refused_before_memory_is_taken(side: int) -> None:
    with pytest.raises(EvalError, match="are not evaluated"):
        OnnxEncoder(Session(["n", 3, side, side]), FILE, name="s")
    with pytest.raises(EvalError, match="are not evaluated"):
        OnnxEncoder(Session(["n", 3, "h", "w"]), FILE, name="s", size_px=side)
