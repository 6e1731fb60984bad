"""One contract for every codec."""

import json

import numpy as np
import pytest

from radio_cache.codecs import CODECS, codec_from_json
from radio_cache.errors import CodecError, UnsupportedFormatError

EXAMPLES = {"half": {"name": "half"}}
"""A stored JSON of each codec; a new codec adds its line here."""

FEATURES = (np.random.default_rng(0).standard_t(3, size=(2, 5, 5, 12)) * 3).astype(np.float32)


def test_every_codec_has_an_example() -> None:
    assert EXAMPLES.keys() == CODECS.keys()


@pytest.mark.parametrize("name", CODECS)
def test_codec_survives_json_and_is_the_same_value_again(name: str) -> None:
    codec = codec_from_json(EXAMPLES[name])
    stored = json.loads(json.dumps(codec.to_json()))
    assert codec.name == stored["name"] == name
    assert codec_from_json(stored) == codec


@pytest.mark.parametrize("name", CODECS)
def test_codes_keep_the_shape_and_decode_to_float32_near_the_features(name: str) -> None:
    codec = codec_from_json(EXAMPLES[name])
    codes = codec.encode(FEATURES)
    assert codes.shape == FEATURES.shape
    assert codes.dtype == codec.dtype
    assert codec.dtype.newbyteorder("<") == codec.dtype
    decoded = codec.decode(codes)
    assert decoded.dtype == np.float32
    norms = np.linalg.norm(decoded, axis=-1) * np.linalg.norm(FEATURES, axis=-1)
    assert ((decoded * FEATURES).sum(axis=-1) / norms).min() > 0.95


@pytest.mark.parametrize("name", CODECS)
def test_encoding_one_map_alone_gives_the_same_codes(name: str) -> None:
    codec = codec_from_json(EXAMPLES[name])
    np.testing.assert_array_equal(codec.encode(FEATURES)[1], codec.encode(FEATURES[1]))


@pytest.mark.parametrize("name", CODECS)
def test_fill_value_is_never_emitted(name: str) -> None:
    codec = codec_from_json(EXAMPLES[name])
    codes = codec.encode(np.concatenate([FEATURES, 0 * FEATURES, 1e-30 * FEATURES, 1000 * FEATURES]))
    is_fill = np.isnan(codes) if np.isnan(codec.fill_value) else codes == codec.fill_value
    assert not is_fill.any()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_values_a_codec_cannot_keep_are_an_error_and_never_stored(name: str, value: float) -> None:
    features = FEATURES.copy()
    features[1, 2, 3, 4] = value
    with pytest.raises(CodecError, match=f"codec {name} "):
        codec_from_json(EXAMPLES[name]).encode(features)


def test_a_codec_of_the_future_is_named_with_the_cure() -> None:
    with pytest.raises(UnsupportedFormatError, match=r"codec 'klt9' is not known here \(known: half.*install"):
        codec_from_json({"name": "klt9"})
