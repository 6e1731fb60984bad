"""`radio_cache.codecs.klt_zstd` on the device, up to the bytes that zstd compresses."""

import torch
from jaxtyping import Float
from torch import Tensor

from radio_cache.codecs import KltZstd
from radio_cache.codecs.klt_zstd import GAINS_PER_OCTAVE, LARGEST, LARGEST_GAIN, SMALLEST_GAIN
from radio_cache.codecs.limits import not_finite
from radio_cache.torch.base import Encoded, largest_magnitude
from radio_cache.torch.klt import KltForward, KltInverse


class KltZstdEncoder:
    """Rounding to a step per token, and the layout of the integers."""

    def __init__(self, codec: KltZstd, device: torch.device) -> None:
        self._codec, self._klt = codec, KltForward(codec.basis, device)

    def encode(self, features: Float[Tensor, "b h w c"]) -> Encoded:
        """Encode maps to codes (b, *row_shape), which zstd compresses later, on the CPU."""
        coordinates = self._klt.coordinates(features)
        codes, decoded = _codes_and_decoded(coordinates, self._codec)
        return self._klt.measured(codes, coordinates, decoded)


class KltZstdDecoder(KltInverse):
    """Integers times the token's step."""

    def __init__(self, codec: KltZstd, device: torch.device) -> None:
        super().__init__(codec.basis, device)
        self._codec = codec

    def coordinates(self, codes: Tensor) -> Float[Tensor, "b h w c"]:
        """Decode codes (b, *row_shape) to coordinates in the basis."""
        return _coordinates(codes, self._codec)

    def axis_transforms(self, grid_hw: tuple[int, int]) -> None:
        """Return None: coordinates are those of tokens."""
        return


def _codes_and_decoded(coordinates: Tensor, codec: KltZstd) -> tuple[Tensor, Tensor]:
    """Return the codes of coordinates (b, h, w, c), and the coordinates they decode to."""
    gains = torch.zeros_like(coordinates[..., 0])  # (b, h, w)
    if codec.layout != "planes":
        nearest = torch.round(GAINS_PER_OCTAVE / 2 * coordinates.double().square().mean(-1).log2())
        gains = nearest.clamp(SMALLEST_GAIN, LARGEST_GAIN).float()
    steps = (codec.step * torch.exp2(gains / GAINS_PER_OCTAVE))[..., None]
    rounded = torch.round(coordinates / steps)
    if not largest_magnitude(rounded) <= LARGEST[codec.layout]:
        raise not_finite(largest_magnitude(coordinates) * codec.basis.phi)
    # (b, h, w, c) -> (b, c, h, w)
    low, high = _split(rounded.to(torch.int32).movedim(-1, -3), codec)
    if codec.layout == "planes":
        return torch.stack([low, high], dim=-4), rounded * steps
    return torch.cat([gains.to(torch.int8), low, high.flatten(-3, -2)], dim=-2), rounded * steps


def _split(integers: Tensor, codec: KltZstd) -> tuple[Tensor, Tensor]:
    """`klt_zstd.split_integers` on the device."""
    if codec.layout != "nibbles":
        low = integers.to(torch.int8)  # wraps around
        return low if codec.layout == "planes" else low.flatten(-3, -2), ((integers - low) >> 8).to(torch.int8)
    low = ((integers + 8) & 15) - 8
    high, low = ((integers - low) >> 4).to(torch.int8), low.flatten(-3, -2)
    if low.shape[-2] % 2:
        low = torch.cat([low, torch.zeros_like(low[..., :1, :])], dim=-2)
    return (low[..., 0::2, :] & 15 | low[..., 1::2, :] << 4).to(torch.int8), high


def _coordinates(codes: Tensor, codec: KltZstd) -> Tensor:
    """`KltZstd.coordinates` on the device."""
    if codec.layout == "planes":
        low, high = codes[..., 0, :, :, :], codes[..., 1, :, :, :]
        return ((low.to(torch.int16) + high.to(torch.int16) * 256).float() * codec.step).movedim(-3, -1)
    row_height, channels = codes.shape[-2], codec.basis.channels
    h = codec.grid_height(row_height)
    gains, low, high = torch.split(codes, [h, row_height - (channels + 1) * h, channels * h], dim=-2)
    high = high.unflatten(-2, (channels, h)).to(torch.int16)
    if codec.layout == "nibbles":
        # The shift to the right keeps the sign.
        pairs = torch.stack([(low << 4) >> 4, low >> 4], dim=-2).flatten(-3, -2)
        integers = pairs[..., : channels * h, :].unflatten(-2, (channels, h)).to(torch.int16) + high * 16
    else:
        integers = low.unflatten(-2, (channels, h)).to(torch.int16) + high * 256
    # (b, c, h, w) -> (b, h, w, c)
    steps = codec.step * torch.exp2(gains.float() / GAINS_PER_OCTAVE)
    return integers.movedim(-3, -1).float() * steps[..., None]
