"""Features to stored codes, on the device: what the build calls. The same numbers as the codecs' own `encode`, up to
float32 rounding of matrix products."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from radio_cache.codecs import Codec, Half, Int8, KltPacked, KltZstd
from radio_cache.codecs.int8 import LARGEST as INT8_LARGEST
from radio_cache.codecs.int8 import MAX_EXPONENT
from radio_cache.codecs.klt_basis import not_finite
from radio_cache.codecs.klt_packed import (
    GAIN_OF_ONE,
    GAINS_PER_OCTAVE,
    LARGEST_GAIN,
    LARGEST_RELATIVE,
    level_table,
)  # fmt: skip
from radio_cache.codecs.klt_zstd import GAINS_PER_OCTAVE as ZSTD_GAINS_PER_OCTAVE
from radio_cache.codecs.klt_zstd import LARGEST as KLT_LARGEST
from radio_cache.codecs.klt_zstd import LARGEST_GAIN as ZSTD_LARGEST_GAIN
from radio_cache.codecs.klt_zstd import SMALLEST_GAIN as ZSTD_SMALLEST_GAIN
from radio_cache.errors import CodecError, UnsupportedFormatError


@dataclass(frozen=True)
class Encoded:
    """codes (b, *row_shape), on the device. cosines (b, h, w) of every token decoded again and as it was, and
    squared_errors (b, h, w), summed over channels."""

    codes: Tensor
    cosines: Float[Tensor, "b h w"]
    squared_errors: Float[Tensor, "b h w"]


class MapEncoder:
    """Encodes maps (b, h, w, c) with one codec on one device, and measures what is lost, in one pass."""

    def __init__(self, codec: Codec, device: torch.device) -> None:
        self._codec, self._device = codec, device
        arrays = {name: torch.from_numpy(array).to(device) for name, array in codec.arrays().items()}
        if isinstance(codec, KltZstd | KltPacked):
            self._mean = arrays["mean"]
            self._rotation = (arrays["basis"].double() / codec.basis.phi).float()
            self._rotated_mean = torch.from_numpy(codec.basis.rotated_mean).to(device)
        if isinstance(codec, KltPacked):
            self._packer = _Packer(codec, device)
        if isinstance(codec, Int8):
            self._scale = arrays["scale"]

    def __call__(self, features: Float[Tensor, "b h w c"]) -> Encoded:
        """Raises CodecError, as the codec's `encode` does, for values it cannot keep."""
        codec = self._codec
        if isinstance(codec, Half):
            return self._half(features)
        if isinstance(codec, Int8):
            return self._int8(features)
        if isinstance(codec, KltZstd | KltPacked):
            return self._klt(features, codec)
        raise UnsupportedFormatError(f"codec '{codec.name}' has no encoder for tensors")

    def _half(self, features: Tensor) -> Encoded:
        codes = features.to(torch.float16)
        if not bool(torch.isfinite(codes).all()):
            raise CodecError(
                f"codec half holds values below 65520, and the teacher returned {float(features.abs().max()):g}; "
                "if that is NaN or inf, run the teacher with --dtype float32"
            )
        return _measured(codes, features, codes.float(), 1.0)

    def _int8(self, features: Tensor) -> Encoded:
        scaled = features / self._scale
        largest = scaled.abs().amax(dim=-1, keepdim=True)
        if not bool(torch.isfinite(largest).all()) or float(largest.max()) >= INT8_LARGEST * 2.0**MAX_EXPONENT:
            raise not_finite(float(features.abs().max()))
        exponent = torch.frexp(largest / INT8_LARGEST)[1].clamp(min=0)
        exponent = torch.where(largest < INT8_LARGEST + 0.5, torch.zeros_like(exponent), exponent)
        codes = torch.round(torch.ldexp(scaled, -exponent))
        decoded = torch.ldexp(codes, exponent) * self._scale
        return _measured(torch.cat([codes, exponent.to(codes.dtype)], dim=-1).to(torch.int8), features, decoded, 1.0)

    def _klt(self, features: Tensor, codec: KltZstd | KltPacked) -> Encoded:
        coordinates = (features - self._mean) @ self._rotation
        if not bool(torch.isfinite(coordinates).all()):
            raise not_finite(float(features.abs().max()))
        if isinstance(codec, KltPacked):
            codes, decoded = self._packer(coordinates)
        else:
            codes, decoded = _zstd_codes(coordinates, codec)
        mean = self._rotated_mean
        return _measured(codes, coordinates + mean, decoded + mean, codec.basis.phi)


class _Packer:
    """Gains, level numbers and bits of packed klt."""

    def __init__(self, codec: KltPacked, device: torch.device) -> None:
        def here(array: object) -> Tensor:
            return torch.as_tensor(array, device=device)

        self._codec = codec
        self._scales = here(codec.scales)
        self._limits = here(codec.limits)
        starts = [*codec.group_starts.tolist(), codec.basis.channels]
        self._groups = [slice(a, b) for a, b in pairwise(starts)]
        self._group_of = here(codec.group_of)
        self._by_width = [
            (here((codec.widths == width).nonzero()[0]), here(table), here((table[1:] + table[:-1]) / 2))
            for width in sorted(set(codec.widths[codec.widths > 0].tolist()))
            for table in [level_table(codec.levels, width)]
        ]
        fields, bits = codec.bit_sources
        self._fields, self._bits = here(fields), here(bits).to(torch.int16)
        self._bit_values = here([1, 2, 4, 8, 16, 32, 64, 128]).to(torch.uint8)

    def __call__(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates (..., c) to stored bytes (..., token_bytes) and to what they decode to (..., c)."""
        relative = coordinates.abs() / self._scales
        if not float(relative.max()) < LARGEST_RELATIVE:
            raise not_finite(float(coordinates.abs().max()) * self._codec.basis.phi)
        rms = torch.stack([relative[..., group].square().mean(-1).sqrt() for group in self._groups], dim=-1)
        limited = relative / self._limits
        loudest = torch.stack([limited[..., group].amax(-1) for group in self._groups], dim=-1)
        nearest, needed = torch.round(GAINS_PER_OCTAVE * rms.log2()), torch.ceil(GAINS_PER_OCTAVE * loudest.log2())
        gains = (torch.maximum(nearest, needed) + GAIN_OF_ONE).clamp(0, LARGEST_GAIN)
        factors = self._scales * torch.exp2((gains - GAIN_OF_ONE) / GAINS_PER_OCTAVE)[..., self._group_of]
        normalised = coordinates / factors
        numbers = torch.zeros_like(coordinates, dtype=torch.int16)
        decoded = torch.zeros_like(coordinates)
        for channels, table, borders in self._by_width:
            found = torch.bucketize(normalised[..., channels], borders)
            numbers[..., channels] = found.to(torch.int16)
            decoded[..., channels] = table[found]
        values = torch.cat([gains.to(torch.int16), numbers, torch.zeros_like(numbers[..., :1])], dim=-1)
        bits = ((values[..., self._fields] >> self._bits) & 1).to(torch.uint8)
        packed = (bits.unflatten(-1, (-1, 8)) * self._bit_values).sum(-1, dtype=torch.uint8)
        return packed, decoded * factors


def _zstd_codes(coordinates: Tensor, codec: KltZstd) -> tuple[Tensor, Tensor]:
    """Coordinates (b, h, w, c) as `KltZstd` stores them, and what they decode to."""
    gains = torch.zeros_like(coordinates[..., 0])
    if codec.layout != "planes":
        wanted = torch.round(ZSTD_GAINS_PER_OCTAVE / 2 * coordinates.double().square().mean(-1).log2())
        gains = wanted.clamp(ZSTD_SMALLEST_GAIN, ZSTD_LARGEST_GAIN).float()
    steps = (codec.step * torch.exp2(gains / ZSTD_GAINS_PER_OCTAVE))[..., None]
    rounded = torch.round(coordinates / steps)
    if not float(rounded.abs().max()) <= KLT_LARGEST[codec.layout]:
        raise not_finite(float(coordinates.abs().max()) * codec.basis.phi)
    low, high = _split(rounded.to(torch.int32).movedim(-1, -3), codec)
    if codec.layout == "planes":
        return torch.stack([low, high], dim=-4), rounded * steps
    return torch.cat([gains.to(torch.int8), low, high.flatten(-3, -2)], dim=-2), rounded * steps


def _split(integers: Tensor, codec: KltZstd) -> tuple[Tensor, Tensor]:
    """`klt_zstd.split` on the device."""
    if codec.layout != "nibbles":
        low = integers.to(torch.int8)  # wraps around
        return low if codec.layout == "planes" else low.flatten(-3, -2), ((integers - low) >> 8).to(torch.int8)
    low = ((integers + 8) & 15) - 8
    high, low = ((integers - low) >> 4).to(torch.int8), low.flatten(-3, -2)
    if low.shape[-2] % 2:
        low = torch.cat([low, torch.zeros_like(low[..., :1, :])], dim=-2)
    return (low[..., 0::2, :] & 15 | low[..., 1::2, :] << 4).to(torch.int8), high


def _measured(codes: Tensor, true: Tensor, found: Tensor, scale: float) -> Encoded:
    lengths = true.norm(dim=-1) * found.norm(dim=-1)
    cosines = torch.where(
        lengths > 0, (true * found).sum(-1) / lengths.clamp(min=1e-30), (true == found).all(-1).float()
    )
    return Encoded(codes, cosines, (true - found).square().sum(-1) * scale**2)
