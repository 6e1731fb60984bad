"""Decoding on the device gives the codec's own numbers."""

import numpy as np
import pytest
import torch

from radio_cache.codecs import CODECS, codec_from_json
from radio_cache.torch import decode_codes


@pytest.mark.parametrize("name", CODECS)
def test_tensors_decode_to_the_same_values_as_arrays(name: str) -> None:
    codec = codec_from_json({"name": name})
    codes = codec.encode(np.random.default_rng(0).normal(size=(2, 4, 4, 8)).astype(np.float32))
    decoded = decode_codes(codec, torch.from_numpy(codes))
    assert decoded.dtype == torch.float32
    np.testing.assert_array_equal(decoded.numpy(), codec.decode(codes))
