"""Features to stored codes, on the device: what the build calls. The same numbers as the codecs' own `encode`, up to
float32 rounding of matrix products."""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from radio_cache.codecs import Codec, Half, Int8, KltPacked, KltZstd
from radio_cache.codecs.int8 import LARGEST as INT8_LARGEST
from radio_cache.codecs.int8 import MAX_EXPONENT
from radio_cache.codecs.klt_basis import LARGEST_FEATURE, not_finite
from radio_cache.codecs.klt_packed import (
    GAIN_OF_ONE,
    GAINS_PER_OCTAVE,
    LARGEST_GAIN,
    LARGEST_RELATIVE,
    level_table,
)
from radio_cache.codecs.klt_zstd import GAINS_PER_OCTAVE as ZSTD_GAINS_PER_OCTAVE
from radio_cache.codecs.klt_zstd import LARGEST as KLT_LARGEST
from radio_cache.codecs.klt_zstd import LARGEST_GAIN as ZSTD_LARGEST_GAIN
from radio_cache.codecs.klt_zstd import SMALLEST_GAIN as ZSTD_SMALLEST_GAIN
from radio_cache.errors import CodecError, UnsupportedFormatError

_CACHED_VALUES = 1 << 18
"""On a CPU so many are encoded together: what stays in a core's cache costs half as much."""

_FEW_BORDERS = 15


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
        together = max(1, _CACHED_VALUES // max(1, math.prod(features.shape[1:])))
        if self._device.type != "cpu" or len(features) <= together:
            return self._encoded(features)
        parts = [self._encoded(some) for some in features.split(together)]
        return Encoded(
            torch.cat([one.codes for one in parts]),
            torch.cat([one.cosines for one in parts]),
            torch.cat([one.squared_errors for one in parts]),
        )

    def _encoded(self, features: Tensor) -> Encoded:
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
                f"codec half holds values below 65520, and the teacher returned {_largest(features):g}; "
                "if that is NaN or inf, run the teacher with --dtype float32"
            )
        return _measured(codes, features, codes.float(), 1.0)

    def _int8(self, features: Tensor) -> Encoded:
        scaled = features / self._scale
        largest = scaled.abs().amax(dim=-1, keepdim=True)
        magnitude = _largest(features)
        if not magnitude <= LARGEST_FEATURE or not _largest(largest) < INT8_LARGEST * 2.0**MAX_EXPONENT:
            raise not_finite(magnitude)
        exponent = torch.frexp(largest / INT8_LARGEST)[1].clamp(min=0)
        exponent = torch.where(largest < INT8_LARGEST + 0.5, torch.zeros_like(exponent), exponent)
        codes = torch.round(torch.ldexp(scaled, -exponent))
        decoded = torch.ldexp(codes, exponent) * self._scale
        return _measured(torch.cat([codes, exponent.to(codes.dtype)], dim=-1).to(torch.int8), features, decoded, 1.0)

    def _klt(self, features: Tensor, codec: KltZstd | KltPacked) -> Encoded:
        coordinates = (features - self._mean) @ self._rotation
        if not math.isfinite(_largest(coordinates)):
            raise not_finite(_largest(features))
        if isinstance(codec, KltPacked):
            codes, decoded = self._packer(coordinates)
        else:
            codes, decoded = _zstd_codes(coordinates, codec)
        mean = self._rotated_mean
        return _measured(codes, coordinates + mean, decoded + mean, codec.basis.phi)


class _Packer:
    """Gains, level numbers and bits of packed klt; from the levels on with a row for each channel, because rows are gathered
    several times faster than columns. Channels of equal width lie together; those without bits are left out."""

    def __init__(self, codec: KltPacked, device: torch.device) -> None:
        def here(array: object) -> Tensor:
            return torch.as_tensor(array, device=device)

        self._codec = codec
        self._scales = here(codec.scales)
        self._limits = here(codec.limits)
        starts = codec.group_starts.tolist()
        self._groups = [slice(a, b) for a, b in pairwise([*starts, codec.basis.channels])]
        self._group_of = here(codec.group_of)
        by_width = np.argsort(codec.widths, kind="stable")
        kept = by_width[codec.widths[by_width] > 0]
        self._kept = here(kept)
        self._widths: list[tuple[slice, Tensor, Tensor]] = []
        for width in np.unique(codec.widths[kept]).tolist():
            first, end = np.searchsorted(codec.widths[kept], [width, width + 1]).tolist()
            table = level_table(codec.levels, width)
            self._widths.append((slice(first, end), here(table), here((table[1:] + table[:-1]) / 2)))
        row_of = np.full(codec.basis.channels, len(kept))  # which is a row of zeros
        row_of[kept] = np.arange(len(kept))
        self._row_of = here(row_of)
        fields, bits = codec.bit_sources
        rows = np.concatenate([np.arange(len(starts)), len(starts) + row_of, [len(starts) + len(kept)]])
        self._fields, self._bits = here(rows[fields]), here(bits).to(torch.int16)[:, None]
        self._bit_values = here([1, 2, 4, 8, 16, 32, 64, 128]).to(torch.uint8)[:, None]

    def __call__(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates (..., c) to stored bytes (..., token_bytes) and to what they decode to (..., c)."""
        tokens = coordinates.flatten(0, -2)
        relative = tokens.abs() / self._scales
        if not _largest(relative) < LARGEST_RELATIVE:
            raise not_finite(_largest(coordinates) * self._codec.basis.phi)
        gains = self._gains(relative)
        factors = self._scales * torch.exp2((gains - GAIN_OF_ONE) / GAINS_PER_OCTAVE).index_select(-1, self._group_of)
        normalised = (tokens / factors).t().contiguous().index_select(0, self._kept)
        groups = gains.shape[-1]
        values = torch.zeros((groups + len(normalised) + 1, len(tokens)), dtype=torch.int16, device=tokens.device)
        values[:groups] = gains.t()
        levels = torch.zeros((len(normalised) + 1, len(tokens)), device=tokens.device)
        for rows, table, borders in self._widths:
            numbers = _borders_below(normalised[rows], borders)
            values[groups:][rows] = numbers
            levels[rows] = table.index_select(0, numbers.flatten().to(torch.int32)).view_as(numbers)
        decoded = factors * levels.index_select(0, self._row_of).t()
        bits = (values.index_select(0, self._fields) >> self._bits) & 1
        packed = (bits.to(torch.uint8).unflatten(0, (-1, 8)) * self._bit_values).sum(1, dtype=torch.uint8)
        return packed.t().reshape(*coordinates.shape[:-1], self._codec.token_bytes), decoded.view_as(coordinates)

    def _gains(self, relative: Tensor) -> Tensor:
        """Codes (n, groups), as floats, for magnitudes (n, c) in units of the channels' scales."""
        rms = torch.stack([relative[:, group].square().mean(-1).sqrt() for group in self._groups], dim=-1)
        limited = relative / self._limits
        loudest = torch.stack([limited[:, group].amax(-1) for group in self._groups], dim=-1)
        nearest, needed = torch.round(GAINS_PER_OCTAVE * rms.log2()), torch.ceil(GAINS_PER_OCTAVE * loudest.log2())
        return (torch.maximum(nearest, needed) + GAIN_OF_ONE).clamp(0, LARGEST_GAIN)


def _borders_below(values: Tensor, borders: Tensor) -> Tensor:
    """How many of the ascending borders lie below each value."""
    if values.device.type == "cpu" and len(borders) <= _FEW_BORDERS:
        # All of them in whole vectors are faster than a search, value by value, among few.
        return (values > borders[:, None, None]).sum(0, dtype=torch.uint8)
    return torch.bucketize(values, borders, out_int32=True)


def _zstd_codes(coordinates: Tensor, codec: KltZstd) -> tuple[Tensor, Tensor]:
    """Coordinates (b, h, w, c) as `KltZstd` stores them, and what they decode to."""
    gains = torch.zeros_like(coordinates[..., 0])
    if codec.layout != "planes":
        wanted = torch.round(ZSTD_GAINS_PER_OCTAVE / 2 * coordinates.double().square().mean(-1).log2())
        gains = wanted.clamp(ZSTD_SMALLEST_GAIN, ZSTD_LARGEST_GAIN).float()
    steps = (codec.step * torch.exp2(gains / ZSTD_GAINS_PER_OCTAVE))[..., None]
    rounded = torch.round(coordinates / steps)
    if not _largest(rounded) <= KLT_LARGEST[codec.layout]:
        raise not_finite(_largest(coordinates) * codec.basis.phi)
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


def _largest(values: Tensor) -> float:
    """Return the largest magnitude, NaN if there is one, and 0 for no values at all."""
    return float(values.abs().max()) if values.numel() else 0.0


def _measured(codes: Tensor, true: Tensor, found: Tensor, scale: float) -> Encoded:
    true_lengths, found_lengths = true.norm(dim=-1), found.norm(dim=-1)
    lengths = true_lengths * found_lengths
    both_zero = (true_lengths == found_lengths).float()  # where the product is 0
    cosines = torch.where(lengths > 0, (true * found).sum(-1) / lengths.clamp(min=1e-30), both_zero)
    return Encoded(codes, cosines, (true - found).square().sum(-1) * scale**2)
