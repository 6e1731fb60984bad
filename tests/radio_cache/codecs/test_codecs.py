"""One contract for every codec."""

import contextlib
import json
import math
from dataclasses import replace
from functools import cache, partial
from typing import get_args

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from radio_cache.codecs import CODECS, Codec, KltZstd, codec_from_json, codec_label
from radio_cache.codecs.base import CalibrationMaps
from radio_cache.codecs.calibrate import CodecRequest, calibrate
from radio_cache.codecs.klt_zstd import Layout
from radio_cache.errors import CodecError, CorruptShardError, RadioCacheError, StoreError, UnsupportedFormatError
from radio_cache.statistics.moments import Moments

FEATURES = (np.random.default_rng(0).standard_t(3, size=(2, 5, 4, 32)) * 3).astype(np.float32)
TOKENS = (np.random.default_rng(1).standard_t(3, size=(2000, 32)) * 3).astype(np.float32)


def calibrated(request: CodecRequest) -> Codec:
    maps = TOKENS.reshape(-1, 5, 4, 32)
    sample = CalibrationMaps(fitted=maps, held_out=maps[:25], valid=np.ones((25, 5, 4), np.bool_))
    return calibrate(request, Moments.of(TOKENS), TOKENS, TOKENS[:500], maps=sample).codec


EXAMPLES = {
    "half": calibrated(CodecRequest(name="half")),
    "int8": calibrated(CodecRequest(name="int8")),
    "klt/packed": calibrated(CodecRequest(packing="packed", fidelity=0.99)),
    "klt/zstd": calibrated(CodecRequest(packing="zstd", fidelity=0.99)),
    "klt/ans": calibrated(CodecRequest(packing="ans", fidelity=0.99)),
}
"""A value of each codec; a new codec adds its line here."""

every_codec = pytest.mark.parametrize("name", CODECS)


def test_every_codec_has_an_example() -> None:
    assert EXAMPLES.keys() == CODECS.keys()


@every_codec
def test_codec_survives_storage_and_is_the_same_again(name: str) -> None:
    codec = EXAMPLES[name]
    stored = json.loads(json.dumps(codec.to_json()))
    again = codec_from_json(stored, {key: array.copy() for key, array in codec.arrays().items()})
    assert codec_label(stored) == name
    assert type(again) is type(codec)
    assert again.to_json() == codec.to_json()
    np.testing.assert_array_equal(again.encode(FEATURES), codec.encode(FEATURES))


@every_codec
def test_codes_have_the_declared_shape_and_decode_to_float32_near_the_features(name: str) -> None:
    codec = EXAMPLES[name]
    codes = codec.encode(FEATURES)
    assert codes.shape == (2, *codec.row_shape((5, 4), 32))
    assert codes.dtype == codec.dtype
    assert codec.dtype.newbyteorder("<") == codec.dtype
    decoded = codec.decode(codes)
    assert decoded.dtype == np.float32
    assert decoded.shape == FEATURES.shape
    norms = np.linalg.norm(decoded, axis=-1) * np.linalg.norm(FEATURES, axis=-1)
    assert ((decoded * FEATURES).sum(axis=-1) / norms).mean() > 0.98


@every_codec
def test_encoding_one_map_alone_gives_the_same_codes(name: str) -> None:
    codec = EXAMPLES[name]
    np.testing.assert_array_equal(codec.encode(FEATURES)[1], codec.encode(FEATURES[1]))


@every_codec
def test_an_image_is_never_stored_as_fill_values_alone(name: str) -> None:
    codec = EXAMPLES[name]
    maps = np.concatenate([FEATURES, 0 * FEATURES, 1e-30 * FEATURES, 100 * FEATURES])
    for codes in codec.encode(maps):
        is_fill = np.isnan(codes) if math.isnan(codec.fill_value) else codes == codec.fill_value
        assert not is_fill.all()


@every_codec
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e37])
def test_values_a_codec_cannot_keep_are_an_error_and_never_stored(name: str, value: float) -> None:
    features = FEATURES.copy()
    features[1, 2, 3, 4] = value
    with pytest.raises(CodecError, match="float32"), np.errstate(all="ignore"):
        EXAMPLES[name].encode(features)


@every_codec
def test_arrays_that_are_not_there_are_a_named_error(name: str) -> None:
    codec = EXAMPLES[name]
    for missing in codec.arrays():
        with pytest.raises(StoreError, match=f"'{missing}' is missing"):
            codec_from_json(codec.to_json(), {k: a for k, a in codec.arrays().items() if k != missing})


@every_codec
def test_any_stored_bytes_decode_without_a_crash(name: str) -> None:
    codec = EXAMPLES[name]
    shape = codec.row_shape((5, 4), 32)
    noise = np.random.default_rng(3).integers(0, 256, math.prod(shape) * codec.dtype.itemsize, np.uint8)
    # An entropy code may know that no encoder wrote the bytes.
    with np.errstate(all="ignore"), contextlib.suppress(CorruptShardError):
        assert codec.decode(noise.view(codec.dtype).reshape(shape)).shape == (5, 4, 32)


CONTRACT = (
    test_codec_survives_storage_and_is_the_same_again,
    test_codes_have_the_declared_shape_and_decode_to_float32_near_the_features,
    test_encoding_one_map_alone_gives_the_same_codes,
    test_an_image_is_never_stored_as_fill_values_alone,
    *(
        partial(test_values_a_codec_cannot_keep_are_an_error_and_never_stored, value=value)
        for value in (np.nan, np.inf, -np.inf, 1e37)
    ),
    test_arrays_that_are_not_there_are_a_named_error,
    test_any_stored_bytes_decode_without_a_crash,
)
"""The tests of one codec by name, for `test_new_codec.py`."""

LAYOUTS = [*CODECS, *(f"klt/zstd, {layout}" for layout in get_args(Layout))]


@cache
def codec_of(name: str, channels: int, grid_hw: tuple[int, int]) -> Codec:
    """A codec, or a layout of klt/zstd, for so many channels and maps of this grid."""
    label, _, layout = name.partition(", ")
    codec_name, _, packing = label.partition("/")
    request = CodecRequest(name=codec_name, packing=packing or "packed", fidelity=0.9)
    tokens = TOKENS[:400, :channels]
    grid = math.prod(grid_hw)
    maps = tokens[: len(tokens) // grid * grid].reshape(-1, *grid_hw, channels)
    sample = CalibrationMaps(fitted=maps, held_out=maps, valid=np.ones(maps.shape[:3], np.bool_))
    codec = calibrate(request, Moments.of(tokens), tokens, tokens, maps=sample).codec
    return replace(codec, layout=layout) if layout and isinstance(codec, KltZstd) else codec


@pytest.mark.parametrize("name", LAYOUTS)
@settings(deadline=None, max_examples=40)
@given(
    leading=st.lists(st.integers(0, 3), max_size=3),
    h=st.integers(1, 5),
    w=st.integers(1, 5),
    channels=st.sampled_from([1, 2, 3, 5, 16, 31]),
)
@example(leading=[0], h=7, w=7, channels=5)
@example(leading=[1, 0], h=1, w=1, channels=1)
def test_any_number_of_images_views_rows_and_channels_round_trips(
    name: str, leading: list[int], h: int, w: int, channels: int
) -> None:
    codec = codec_of(name, channels, (h, w))
    features = np.random.default_rng(channels).standard_normal((*leading, h, w, channels)).astype(np.float32)
    codes = codec.encode(features)
    assert codes.shape == (*leading, *codec.row_shape((h, w), channels))
    assert codes.dtype == codec.dtype
    decoded = codec.decode(codes)
    assert decoded.shape == features.shape
    assert decoded.dtype == np.float32
    for index in np.ndindex(*leading):
        np.testing.assert_allclose(decoded[index], codec.decode(codec.encode(features[index])), rtol=1e-4, atol=1e-4)


def test_an_unknown_codec_asks_for_a_newer_version() -> None:
    with pytest.raises(UnsupportedFormatError, match="klt9"):
        codec_from_json({"name": "klt9"})
    with pytest.raises(UnsupportedFormatError, match="klt/huffman"):
        codec_from_json({"name": "klt", "packing": "huffman"})


def test_errors_of_codecs_are_errors_of_radio_cache() -> None:
    assert issubclass(CodecError, RadioCacheError)
