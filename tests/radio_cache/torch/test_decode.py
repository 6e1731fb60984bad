"""Decoding on the device gives the codec's own numbers."""

import numpy as np
import pytest
import torch

from radio_cache.codecs import CODECS, Codec
from radio_cache.codecs.calibrate import CodecRequest, calibrate
from radio_cache.moments import Moments
from radio_cache.torch import MapDecoder, crop_maps, decode_codes

TOKENS = (np.random.default_rng(1).standard_t(3, size=(2000, 32)) * 3).astype(np.float32)
MAPS = (np.random.default_rng(0).standard_t(3, size=(2, 5, 4, 32)) * 3).astype(np.float32)
REQUESTS = {
    "half": CodecRequest(name="half"),
    "int8": CodecRequest(name="int8"),
    "klt/packed": CodecRequest(packing="packed"),
    "klt/zstd": CodecRequest(packing="zstd"),
}

every_codec = pytest.mark.parametrize("name", CODECS)


def codec_named(name: str) -> Codec:
    return calibrate(REQUESTS[name], Moments.of(TOKENS), TOKENS, TOKENS[:400]).codec


@every_codec
def test_tensors_decode_to_the_same_values_as_arrays(name: str) -> None:
    codec = codec_named(name)
    codes = codec.encode(MAPS)
    decoded = decode_codes(codec, torch.from_numpy(codes))
    assert decoded.dtype == torch.float32
    np.testing.assert_allclose(decoded.numpy(), codec.decode(codes), rtol=1e-5, atol=1e-4)


@every_codec
def test_a_crop_may_be_cut_before_the_last_step(name: str) -> None:
    codec = codec_named(name)
    codes = torch.from_numpy(codec.encode(MAPS))
    rows = torch.softmax(torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    columns = torch.softmax(torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(1)), dim=-1)
    decoder = MapDecoder(codec, torch.device("cpu"))
    early = decoder.features(crop_maps(decoder.coordinates(codes), rows, columns))
    torch.testing.assert_close(early, crop_maps(decode_codes(codec, codes), rows, columns), rtol=1e-4, atol=1e-4)
