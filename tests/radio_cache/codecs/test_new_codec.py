"""A new codec, from nothing to crops on the device: what "Adding a codec" in CONTRIBUTING shows.

`Uint8` is the NumPy side, `Uint8Encoder` and `Uint8Decoder` are the device side. In the project they would be the files
`radio_cache/codecs/uint8.py` and `radio_cache/torch/uint8.py`; `registered` adds the two dict lines.
"""

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_builder.build import BuildConfig, build_cache
from cache_builder.teachers import FAMILIES, TEACHERS
from cache_builder.teachers.preset import TeacherOptions
from radio_cache.codecs import CODECS, Calibrated, CalibrationSample, CalibrationTarget, codec_from_json
from radio_cache.codecs.base import Needs
from radio_cache.codecs.calibrate import CodecRequest, calibrate, codec_names, settings_of
from radio_cache.codecs.limits import LARGEST_FEATURE, not_finite, too_few_tokens
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.documents import teacher_documents
from radio_cache.geometry.crops import crop_weights
from radio_cache.reader import Cache
from radio_cache.statistics.fidelity import measure_fidelity
from radio_cache.statistics.moments import Moments
from radio_cache.testing import fake_features, make_tiny_cache, write_images
from radio_cache.torch import DEVICE_CODECS, DeviceCodec, Encoded, MapDecoder, MapEncoder, crop_maps, decode_codes
from radio_cache.torch.base import largest_magnitude, measured
from trainer.objective.normalisation import spatial_normaliser

CPU = torch.device("cpu")


# ------------------------------------------------------------------ radio_cache/codecs/uint8.py


@dataclass(frozen=True)
class Uint8:
    """Store q = round(x / (scale 2^e)) + 128, with one scale per teacher and one exponent e per map.

    The exponent fills one more row of tokens below the map. 1 + 1/h bytes a value.
    Bound: |decode(encode(x)) - x| <= scale 2^e / 2, with 2^e < 2 max|x| / (127 scale) or e = 0.

    Args:
        scale: the feature that one step stands for in a map as loud as the calibration tokens.
    """

    needs: ClassVar[Needs] = "tokens"
    reaches_fidelity: ClassVar[bool] = False

    scale: float

    @property
    def name(self) -> str:
        return "uint8"

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("uint8")

    @property
    def fill_value(self) -> float:
        return 0  # a value is 1 to 255

    @property
    def zstd_level(self) -> int | None:
        return None

    @property
    def row_axes(self) -> tuple[str, ...]:
        return ("code_row", "code_column", "code")  # a token needs the row below the map, too

    @property
    def channel_transform(self) -> None:
        return None

    @property
    def transcodable(self) -> None:
        return None

    def row_shape(self, grid_hw: tuple[int, int], channels: int) -> tuple[int, ...]:
        return (grid_hw[0] + 1, grid_hw[1], channels)

    def encode(self, features: NDArray[np.float32]) -> NDArray[np.uint8]:
        largest = np.abs(features).max(axis=(-3, -2, -1), keepdims=True, initial=0)
        if not float(largest.max(initial=0)) <= LARGEST_FEATURE:
            raise not_finite(float(largest.max()))
        exponent = np.maximum(np.frexp(largest / np.float32(127 * self.scale))[1], 0)
        codes = np.rint(np.ldexp(features / np.float32(self.scale), -exponent)) + 128
        below = np.broadcast_to(exponent, (*codes.shape[:-3], 1, *codes.shape[-2:]))
        return np.concatenate([codes, below], axis=-3).astype(np.uint8)

    def decode(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        values = codes[..., :-1, :, :].astype(np.float32) - 128
        return np.ldexp(values, codes[..., -1:, :1, :1].astype(np.int32)) * np.float32(self.scale)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "scale": self.scale}

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {}

    @classmethod
    def from_json(cls, data: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> "Uint8":
        del arrays  # the scale is a number
        return cls(float(data["scale"]))

    @classmethod
    def calibrate(cls, target: CalibrationTarget, sample: CalibrationSample) -> Calibrated:
        del target  # the number of bits is fixed
        if not len(sample.tokens):
            raise too_few_tokens(0, "uint8")
        codec = cls(float(np.abs(sample.tokens).max()) / 127)
        maps = sample.held_out[:, None, None]  # (m, c) -> (m, 1, 1, c)
        return Calibrated(codec, measure_fidelity(sample.held_out, codec.decode(codec.encode(maps))[:, 0, 0]))


# ------------------------------------------------------------------ radio_cache/torch/uint8.py


class Uint8Encoder:
    """Exponent per map, on the device."""

    def __init__(self, codec: Uint8, device: torch.device) -> None:
        del device  # there is no tensor to keep
        self._scale = codec.scale

    def encode(self, features: Tensor) -> Encoded:
        if not largest_magnitude(features) <= LARGEST_FEATURE:
            raise not_finite(largest_magnitude(features))
        largest = features.abs().flatten(1).amax(1)[:, None, None, None]  # (b, h, w, c) -> (b, 1, 1, 1)
        exponent = torch.frexp(largest / (127 * self._scale))[1].clamp(min=0)
        values = torch.round(torch.ldexp(features / self._scale, -exponent))
        below = exponent.float().expand(-1, 1, *values.shape[2:])
        codes = torch.cat([values + 128, below], dim=1).to(torch.uint8)
        return measured(codes, features, torch.ldexp(values, exponent) * self._scale)


class Uint8Decoder:
    """Values times the map's step, on the device."""

    def __init__(self, codec: Uint8, device: torch.device) -> None:
        del device
        self._scale = codec.scale

    def coordinates(self, codes: Tensor) -> Tensor:
        return torch.ldexp(codes[:, :-1].float() - 128, codes[:, -1:, :1, :1].int()) * self._scale

    def features(self, coordinates: Tensor) -> Tensor:
        return coordinates

    def axis_transforms(self, grid_hw: tuple[int, int]) -> None:
        return None


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line in `radio_cache/codecs/__init__.py` and the one in `radio_cache/torch/registry.py`."""
    monkeypatch.setitem(CODECS, "uint8", Uint8)
    monkeypatch.setitem(DEVICE_CODECS, "uint8", DeviceCodec(Uint8Encoder, Uint8Decoder))


# ------------------------------------------------------------------ what the rest of the project makes of it


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
    bound = codec.scale * 2 ** cached.codes(rows)[:, -1, 0, 0].astype(float).max() / 2
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

    def __init__(self, codec: Uint8, device: torch.device) -> None:
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
