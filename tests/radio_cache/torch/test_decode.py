"""Decoding on the device gives the codec's own numbers."""

import numpy as np
import torch

from radio_cache.codecs import Codec
from radio_cache.torch import MapDecoder, crop_maps, decode_codes


def test_tensors_decode_to_the_same_values_as_arrays(codec: Codec, maps: np.ndarray) -> None:
    codes = codec.encode(maps)
    decoded = decode_codes(codec, torch.from_numpy(codes))
    assert decoded.dtype == torch.float32
    np.testing.assert_allclose(decoded.numpy(), codec.decode(codes), rtol=1e-5, atol=1e-4)


def test_a_crop_may_be_cut_before_the_last_step(codec: Codec, maps: np.ndarray) -> None:
    codes = torch.from_numpy(codec.encode(maps))
    rows = torch.softmax(torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    columns = torch.softmax(torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(1)), dim=-1)
    decoder = MapDecoder(codec, torch.device("cpu"))
    early = decoder.features(crop_maps(decoder.coordinates(codes), rows, columns))
    torch.testing.assert_close(early, crop_maps(decode_codes(codec, codes), rows, columns), rtol=1e-4, atol=1e-4)
