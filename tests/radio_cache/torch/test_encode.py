"""Encoding on the device gives what the codec's own `encode` gives, and says what was lost."""

import numpy as np
import pytest
import torch

from radio_cache.codecs import CODECS, Codec
from radio_cache.codecs.calibrate import CodecRequest, calibrate
from radio_cache.errors import CodecError
from radio_cache.moments import Moments
from radio_cache.torch import MapEncoder

TOKENS = (np.random.default_rng(1).standard_t(3, size=(2000, 32)) * 3).astype(np.float32)
MAPS = (np.random.default_rng(0).standard_t(3, size=(2, 5, 4, 32)) * 3).astype(np.float32)
REQUESTS = {
    "half": CodecRequest(name="half"),
    "int8": CodecRequest(name="int8"),
    "klt/packed": CodecRequest(packing="packed"),
    "klt/zstd": CodecRequest(packing="zstd"),
}
CPU = torch.device("cpu")

every_codec = pytest.mark.parametrize("name", CODECS)


def codec_named(name: str) -> Codec:
    return calibrate(REQUESTS[name], Moments.of(TOKENS), TOKENS, TOKENS[:400]).codec


@every_codec
def test_tensors_encode_to_the_same_codes_as_arrays(name: str) -> None:
    codec = codec_named(name)
    codes = MapEncoder(codec, CPU)(torch.from_numpy(MAPS)).codes.numpy()
    own = codec.encode(MAPS)
    assert codes.dtype == own.dtype
    assert codes.shape == own.shape
    # A value on the border between two levels may fall to either side: matrix products are summed in different orders.
    assert (codes != own).mean() < 0.002


@every_codec
def test_what_is_measured_is_what_decoding_gives(name: str) -> None:
    codec = codec_named(name)
    encoded = MapEncoder(codec, CPU)(torch.from_numpy(MAPS))
    decoded = codec.decode(encoded.codes.numpy())
    lengths = np.linalg.norm(decoded, axis=-1) * np.linalg.norm(MAPS, axis=-1)
    np.testing.assert_allclose(encoded.cosines.numpy(), (decoded * MAPS).sum(-1) / lengths, atol=1e-4)
    np.testing.assert_allclose(encoded.squared_errors.numpy(), np.square(decoded - MAPS).sum(-1), rtol=1e-2, atol=1e-3)


@every_codec
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e37])
def test_values_a_codec_cannot_keep_are_the_same_error(name: str, value: float) -> None:
    maps = MAPS.copy()
    maps[1, 2, 3, 4] = value
    with pytest.raises(CodecError, match="float32"):
        MapEncoder(codec_named(name), CPU)(torch.from_numpy(maps))
