"""A new codec, from its registration to crops on the device: the example of CONTRIBUTING.md, run as it stands there.

`Uint8` is the NumPy side, `Uint8Encoder` and `Uint8Decoder` are the device side. In the project they would be the files
`radio_cache/codecs/uint8.py` and `radio_cache/torch/uint8.py`.
"""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_builder.build import BuildConfig, build_cache
from cache_builder.teachers import FAMILIES, TEACHERS
from cache_builder.teachers.preset import TeacherOptions
from radio_cache.codecs import CODECS, codec_from_json
from radio_cache.codecs.calibrate import CodecRequest, calibrate, codec_names, settings_of
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.documents import teacher_documents
from radio_cache.geometry.crops import crop_weights
from radio_cache.reader import Cache
from radio_cache.statistics.moments import Moments
from radio_cache.testing import fake_features, make_tiny_cache, write_images
from radio_cache.torch import DEVICE_CODECS, DeviceCodec, MapDecoder, MapEncoder, crop_maps, decode_codes
from trainer.objective.normalisation import spatial_normaliser

CPU = torch.device("cpu")


def example(heading: str) -> str:
    """Return the code block below a heading of CONTRIBUTING.md."""
    text = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [section] = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    [code] = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return code


# The example registers its codec. Other test files must not see it, so each test here registers it again.
NAMES: dict[str, Any] = {"__name__": "example"}
with patch.dict(CODECS), patch.dict(DEVICE_CODECS):
    exec(example("Adding a codec"), NAMES)
    NUMPY_CODEC, DEVICE_CODEC = CODECS["uint8"], DEVICE_CODECS["uint8"]
Uint8: Any = NAMES["Uint8"]
Uint8Encoder: Any = NAMES["Uint8Encoder"]
Uint8Decoder: Any = NAMES["Uint8Decoder"]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the codec by the last two lines of the example."""
    monkeypatch.setitem(CODECS, "uint8", NUMPY_CODEC)
    monkeypatch.setitem(DEVICE_CODECS, "uint8", DEVICE_CODEC)


def loaded(path: Path) -> ModuleType:
    """A file of tests as a module; pytest does not put its folders on the import path."""
    spec = importlib.util.spec_from_file_location(f"shared_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SHARED = loaded(Path(__file__).with_name("test_codecs.py"))
TOKENS = SHARED.TOKENS


def test_a_request_finds_it_by_its_name_and_calibrates_it() -> None:
    assert "uint8" in codec_names()
    assert settings_of("uint8") == ()
    request = CodecRequest(name="uint8")
    assert request.to_json() == {"name": "uint8"}
    assert request.needs_calibration
    calibrated = calibrate(request, Moments.of(TOKENS), TOKENS, TOKENS[:500])
    assert calibrated.codec == codec_from_json(calibrated.codec.to_json())
    assert calibrated.fidelity.cosine > 0.98


@pytest.mark.parametrize(
    "check", SHARED.CONTRACT, ids=[getattr(check, "func", check).__name__ for check in SHARED.CONTRACT]
)
def test_it_keeps_the_contract_of_every_codec(check: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHARED.EXAMPLES, "uint8", SHARED.calibrated(CodecRequest(name="uint8")))
    check("uint8")


def test_the_device_gives_the_numbers_of_numpy() -> None:
    codec, maps = Uint8(0.1), SHARED.FEATURES
    encoded = MapEncoder(codec, CPU)(torch.from_numpy(maps))
    np.testing.assert_array_equal(encoded.codes.numpy(), codec.encode(maps))
    np.testing.assert_allclose(decode_codes(codec, encoded.codes).numpy(), codec.decode(codec.encode(maps)), rtol=1e-6)
    squared_errors = np.square(codec.decode(codec.encode(maps)) - maps).sum(-1)
    np.testing.assert_allclose(encoded.squared_errors.numpy(), squared_errors, rtol=1e-3)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    write_images(folder, per_class=5)
    return folder


def test_a_cache_stores_it_and_training_reads_it(photos: Path, tmp_path: Path) -> None:
    cache = make_tiny_cache(tmp_path / "c.zarr", photos, codecs={"fake-a": CodecRequest(name="uint8")})
    cached = Cache(cache.url).teachers["fake-a"]
    codec = cached.codec
    assert isinstance(codec, Uint8)
    rows = cache.usable_rows().tolist()
    maps = cached.maps(rows)
    bound = codec.to_json()["scale"] * 2 ** cached.codes(rows)[:, -1, 0, 0].astype(float).max() / 2
    for row, features in zip(rows, maps, strict=True):
        _, true = fake_features(cache.decode(cache.read_file(row)), cached.spec)
        assert np.abs(features - true).max() <= bound * 1.001
    # Crops are cut from coordinates, before the last step of decoding.
    sizes_hw = [(int(h), int(w)) for h, w in cache.sizes_hw[rows]]
    boxes = [(0.0, 0.0, w / 2, h / 2) for h, w in sizes_hw]
    weights = crop_weights(boxes, sizes_hw, cached.spec.geometry, out_hw=(2, 3))
    rows_matrix, columns_matrix = torch.from_numpy(weights.rows), torch.from_numpy(weights.columns)
    decoder = MapDecoder(codec, CPU)
    crops = decoder.features(decoder.crops(torch.from_numpy(cached.codes(rows)), rows_matrix, columns_matrix))
    torch.testing.assert_close(crops, crop_maps(torch.from_numpy(maps), rows_matrix, columns_matrix))
    normaliser = spatial_normaliser(cache, "fake-a", "global", cache.usable_rows(), 0, CPU)
    assert normaliser is not None
    assert torch.isfinite(normaliser(crops)).all()


def test_a_build_calibrates_it_and_encodes_with_it(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = loaded(Path(__file__).parents[2] / "cache_builder/fake_teacher.py")
    monkeypatch.setitem(FAMILIES, "fake", fake.FakeTeacher)
    monkeypatch.setitem(TEACHERS, "fake-a", fake.PRESETS[0])
    options = TeacherOptions(codec=CodecRecord.of_request(CodecRequest(name="uint8")))
    settings = fake.settings(photos, tmp_path / "out.zarr") | {"teachers": {"fake-a": options}}
    cached = build_cache(BuildConfig(**settings)).cache.teachers["fake-a"]
    assert isinstance(cached.codec, Uint8)
    fidelity = cached.fidelity()
    assert fidelity is not None
    assert fidelity.cosine > 0.99


class WithTable(Uint8):
    """A codec with an array of two axes."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"table": np.zeros((2, 3), np.float32)}


def test_an_array_of_a_new_name_has_a_name_for_each_axis(photos: Path, tmp_path: Path) -> None:
    cache = make_tiny_cache(tmp_path / "c.zarr", photos)
    documents = dict(teacher_documents(cache.meta, cache.teachers["fake-a"].spec, WithTable(0.1)))
    assert json.loads(documents["transform/table/zarr.json"])["dimension_names"] == ["axis_0", "axis_1"]


class CoefficientDecoder(Uint8Decoder):
    """A decoder whose coordinates are coefficients of an orthonormal transform along rows and along columns."""

    def __init__(self, codec: Any, device: torch.device) -> None:
        super().__init__(codec, device)
        generator = torch.Generator().manual_seed(0)
        self._matrices = {
            side: torch.linalg.qr(torch.randn(side, side, generator=generator)).Q for side in range(1, 12)
        }

    def coordinates(self, codes: Tensor) -> Tensor:
        rows, columns = self.axis_transforms((codes.shape[1] - 1, codes.shape[2]))
        return torch.einsum("hk,wl,bhwc->bklc", rows, columns, super().coordinates(codes))

    def axis_transforms(self, grid_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self._matrices[grid_hw[0]], self._matrices[grid_hw[1]]


def test_a_decoder_may_leave_a_transform_along_the_axes_to_the_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = Uint8(0.1)
    codes = torch.from_numpy(codec.encode(SHARED.FEATURES))
    rows = torch.softmax(torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    columns = torch.softmax(torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(1)), dim=-1)
    plain = MapDecoder(codec, CPU)
    monkeypatch.setitem(DEVICE_CODECS, "uint8", DeviceCodec(Uint8Encoder, CoefficientDecoder))
    turned = MapDecoder(codec, CPU)
    assert not torch.allclose(turned.coordinates(codes), plain.coordinates(codes))
    torch.testing.assert_close(turned.token_coordinates(codes), plain.coordinates(codes), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        turned.crops(codes, rows, columns), plain.crops(codes, rows, columns), rtol=1e-4, atol=1e-4
    )
