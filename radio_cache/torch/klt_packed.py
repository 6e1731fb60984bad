"""`radio_cache.codecs.klt_packed` on the device."""

from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from radio_cache.codecs import KltPacked
from radio_cache.codecs.klt_gains import GAIN_BITS, GAIN_OF_ONE, GAINS_PER_OCTAVE, LARGEST_GAIN
from radio_cache.codecs.klt_packed import LARGEST_RELATIVE, level_table
from radio_cache.codecs.limits import not_finite
from radio_cache.torch.base import Encoded, largest_magnitude
from radio_cache.torch.klt import KltForward, KltInverse

_FEW_BORDERS = 15


class KltPackedEncoder:
    """Gains, level numbers and bits.

    From the levels on, tensors have a row for each channel: rows are gathered several times faster than columns. Channels
    of equal width lie together, and those without bits are left out.
    """

    def __init__(self, codec: KltPacked, device: torch.device) -> None:
        def on_device(array: object) -> Tensor:
            return torch.as_tensor(array, device=device)

        self._klt = KltForward(codec.basis, device)

        self._codec = codec
        self._scales = on_device(codec.scales)
        self._limits = on_device(codec.limits)
        starts = codec.group_starts.tolist()
        self._groups = [slice(a, b) for a, b in pairwise([*starts, codec.basis.channels])]
        self._group_of = on_device(codec.group_of)
        by_width = np.argsort(codec.widths, kind="stable")
        coded = by_width[codec.widths[by_width] > 0]
        self._coded_channels = on_device(coded)
        self._widths: list[tuple[slice, Tensor, Tensor]] = []
        for width in np.unique(codec.widths[coded]).tolist():
            first, end = np.searchsorted(codec.widths[coded], [width, width + 1]).tolist()
            table = level_table(codec.levels, width)
            self._widths.append((slice(first, end), on_device(table), on_device((table[1:] + table[:-1]) / 2)))
        row_of = np.full(codec.basis.channels, len(coded))  # the last row, which is zero
        row_of[coded] = np.arange(len(coded))
        self._row_of = on_device(row_of)
        fields, bits = codec.bit_sources
        rows = np.concatenate([np.arange(len(starts)), len(starts) + row_of, [len(starts) + len(coded)]])
        self._fields, self._bits = on_device(rows[fields]), on_device(bits).to(torch.int16)[:, None]
        self._bit_values = on_device([1, 2, 4, 8, 16, 32, 64, 128]).to(torch.uint8)[:, None]

    def encode(self, features: Float[Tensor, "b h w c"]) -> Encoded:
        """Encode maps to bytes (b, h, w, token_bytes)."""
        coordinates = self._klt.coordinates(features)
        codes, decoded = self._pack(coordinates)
        return self._klt.measured(codes, coordinates, decoded)

    def _pack(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bytes (..., token_bytes) of coordinates (..., c), and the coordinates (..., c) they decode to."""
        tokens = coordinates.flatten(0, -2)  # (b, h, w, c) -> (n, c)
        relative = tokens.abs() / self._scales
        if not largest_magnitude(relative) < LARGEST_RELATIVE:
            raise not_finite(largest_magnitude(coordinates) * self._codec.basis.phi)
        gains = self._gains(relative)
        factors = self._scales * torch.exp2((gains - GAIN_OF_ONE) / GAINS_PER_OCTAVE).index_select(-1, self._group_of)
        # (n, c) -> (coded channels, n)
        normalised = (tokens / factors).t().contiguous().index_select(0, self._coded_channels)
        groups = gains.shape[-1]
        values = torch.zeros((groups + len(normalised) + 1, len(tokens)), dtype=torch.int16, device=tokens.device)
        values[:groups] = gains.t()
        levels = torch.zeros((len(normalised) + 1, len(tokens)), device=tokens.device)
        for rows, table, borders in self._widths:
            numbers = _borders_below(normalised[rows], borders)
            values[groups:][rows] = numbers
            levels[rows] = table.index_select(0, numbers.flatten().to(torch.int32)).view_as(numbers)
        decoded = factors * levels.index_select(0, self._row_of).t()
        # One row for each bit of a token; eight rows make a byte.
        bits = (values.index_select(0, self._fields) >> self._bits) & 1
        packed = (bits.to(torch.uint8).unflatten(0, (-1, 8)) * self._bit_values).sum(1, dtype=torch.uint8)
        return packed.t().reshape(*coordinates.shape[:-1], self._codec.token_bytes), decoded.view_as(coordinates)

    def _gains(self, relative: Tensor) -> Tensor:
        """Return gain codes (n, groups), as floats, for magnitudes (n, c) in units of the channels' scales."""
        # (n, c) -> (n, groups)
        rms = torch.stack([relative[:, group].square().mean(-1).sqrt() for group in self._groups], dim=-1)
        limited = relative / self._limits
        loudest = torch.stack([limited[:, group].amax(-1) for group in self._groups], dim=-1)
        nearest, needed = torch.round(GAINS_PER_OCTAVE * rms.log2()), torch.ceil(GAINS_PER_OCTAVE * loudest.log2())
        return (torch.maximum(nearest, needed) + GAIN_OF_ONE).clamp(0, LARGEST_GAIN)


def _borders_below(values: Tensor, borders: Tensor) -> Tensor:
    """Return the number of ascending borders below each value."""
    if values.device.type == "cpu" and len(borders) <= _FEW_BORDERS:
        # Comparing whole vectors with every border is faster than a binary search for each value, for few borders.
        return (values > borders[:, None, None]).sum(0, dtype=torch.uint8)
    return torch.bucketize(values, borders, out_int32=True)


class KltPackedDecoder(KltInverse):
    """Shifts and a table look-up for each channel."""

    def __init__(self, codec: KltPacked, device: torch.device) -> None:
        super().__init__(codec.basis, device)
        groups = len(codec.group_starts)
        starts = torch.cat([GAIN_BITS * torch.arange(groups), torch.from_numpy(codec.bit_starts)]).to(device)
        widths = torch.cat(
            [torch.full((groups,), GAIN_BITS, device=device), torch.from_numpy(codec.widths).to(device).long()]
        )
        # A field of up to 10 bits starts in byte k and may reach into byte k + 2. Past the end, the last byte is read
        # again, and masked away.
        self._bytes = torch.clamp(starts // 8 + torch.arange(3, device=device)[:, None], max=codec.token_bytes - 1)
        self._shifts = (starts % 8).to(torch.int32)
        self._masks = ((1 << widths) - 1).to(torch.int32)
        self._offsets = torch.clamp((1 << widths[groups:]) - 2, min=0).to(torch.int32)
        scales = torch.from_numpy(codec.scales).to(device)
        self._scales = torch.where(widths[groups:] > 0, scales, torch.zeros_like(scales))
        self._levels = torch.from_numpy(codec.levels).to(device)
        self._group_of = torch.from_numpy(codec.group_of).to(device)
        self._num_groups = groups

    def coordinates(self, codes: Tensor) -> Float[Tensor, "b h w c"]:
        """Decode bytes (b, h, w, token_bytes) to coordinates in the basis."""
        # index_select and take cost half as much as indexing on a CPU.
        low, middle, high = (codes.index_select(-1, indices).to(torch.int32) for indices in self._bytes)
        fields = ((low | middle << 8 | high << 16) >> self._shifts) & self._masks
        gains = torch.exp2((fields[..., : self._num_groups] - GAIN_OF_ONE).float() / GAINS_PER_OCTAVE)
        levels = self._levels.take((fields[..., self._num_groups :] + self._offsets).long())
        return levels * (self._scales * gains[..., self._group_of])

    def axis_transforms(self, grid_hw: tuple[int, int]) -> None:
        """Return None: coordinates are those of tokens."""
        return
