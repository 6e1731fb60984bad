"""Encoding on the device gives what the codec's own `encode` gives, and measures the loss."""

import numpy as np
import pytest
import torch
from sample_codecs import REQUESTS, calibrated

from radio_cache.codecs import Codec, KltAns
from radio_cache.errors import CodecError
from radio_cache.torch import MapEncoder, decode_codes

CPU = torch.device("cpu")


def test_tensors_encode_to_the_same_codes_as_arrays(codec: Codec, maps: np.ndarray) -> None:
    codes = MapEncoder(codec, CPU)(torch.from_numpy(maps)).codes.numpy()
    expected = codec.encode(maps)
    assert codes.dtype == expected.dtype
    assert codes.shape == expected.shape
    # A value on the border between two levels may fall to either side: matrix products are summed in different orders.
    assert (codes != expected).mean() < 0.002


def test_what_is_measured_is_what_decoding_gives(codec: Codec, maps: np.ndarray) -> None:
    encoded = MapEncoder(codec, CPU)(torch.from_numpy(maps))
    decoded = codec.decode(encoded.codes.numpy())
    lengths = np.linalg.norm(decoded, axis=-1) * np.linalg.norm(maps, axis=-1)
    np.testing.assert_allclose(encoded.cosines.numpy(), (decoded * maps).sum(-1) / lengths, atol=1e-4)
    np.testing.assert_allclose(encoded.squared_errors.numpy(), np.square(decoded - maps).sum(-1), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e37])
def test_values_a_codec_cannot_keep_are_the_same_error(codec: Codec, maps: np.ndarray, value: float) -> None:
    maps[1, 2, 3, 4] = value
    with pytest.raises(CodecError, match="float32"):
        MapEncoder(codec, CPU)(torch.from_numpy(maps))


@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("grid_hw", [(1, 1), (1, 3), (5, 1), (3, 5)])
def test_any_number_of_images_and_tokens_encodes_and_decodes(
    codec: Codec, images: int, grid_hw: tuple[int, int]
) -> None:
    if isinstance(codec, KltAns):
        codec = calibrated(REQUESTS["klt/ans"], grid_hw)
    maps = np.random.default_rng(0).standard_normal((images, *grid_hw, 32)).astype(np.float32)
    encoded = MapEncoder(codec, CPU)(torch.from_numpy(maps))
    assert encoded.codes.shape == (images, *codec.row_shape(grid_hw, 32))
    assert encoded.codes.numpy().dtype == codec.dtype
    assert encoded.cosines.shape == encoded.squared_errors.shape == (images, *grid_hw)
    decoded = decode_codes(codec, encoded.codes)
    assert decoded.shape == maps.shape
    np.testing.assert_allclose(decoded.numpy(), codec.decode(encoded.codes.numpy()), rtol=1e-4, atol=1e-4)
