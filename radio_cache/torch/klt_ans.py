"""`radio_cache.codecs.klt_ans` on the device. Entropy coding itself runs on the CPU, in C or NumPy."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from radio_cache.codecs import KltAns
from radio_cache.codecs.klt_ans import (
    GAINS_PER_OCTAVE,
    LARGEST_GAIN,
    SHORTEST_TOKEN,
    SMALLEST_GAIN,
    dct_matrix,
    excess_gains,
)
from radio_cache.codecs.limits import not_finite
from radio_cache.codecs.rans import LARGEST_VALUE
from radio_cache.errors import StoreError
from radio_cache.torch.base import Encoded, largest_magnitude
from radio_cache.torch.klt import KltForward, KltInverse


class _Coefficients:
    """Integers to coordinates: expansion, inverse DCT, gains."""

    def __init__(self, codec: KltAns, device: torch.device) -> None:
        h, w = codec.grid_hw
        self._step, self._shrink = codec.step, codec.shrink
        self._rows, self._columns = (torch.from_numpy(dct_matrix(size)).to(device) for size in (h, w))

    def forward(self, maps: Tensor) -> Tensor:
        """Transform (b, h, w, c) along rows and columns."""
        return along_axes(maps, self._rows, self._columns)

    def coordinates(self, gains: Tensor, integers: Tensor) -> Tensor:
        """Return (b, h, w, c) coordinates of gains (b, h, w) and integers (b, h, w, c)."""
        values = integers.float()
        offsets = torch.where(values.abs() > 1, self._shrink[1], self._shrink[0])
        expanded = (values + values.sign() * offsets) * self._step
        return along_axes(expanded, self._rows.T, self._columns.T) * gain_values(gains)[..., None]


class KltAnsEncoder:
    """Gains, DCT and rounding on the device, then entropy coding on the CPU."""

    def __init__(self, codec: KltAns, device: torch.device) -> None:
        self._codec, self._klt, self._coefficients = (
            codec,
            KltForward(codec.basis, device),
            _Coefficients(codec, device),
        )
        self._mean = torch.from_numpy(codec.basis.rotated_mean).to(device)
        # (h, w, c) thresholds of each coefficient
        self._first, self._further = (
            torch.from_numpy(np.ascontiguousarray(codec.thresholds[codec.classes, number])).to(device)
            for number in (0, 1)
        )

    def encode(self, features: Float[Tensor, "b h w c"]) -> Encoded:
        coordinates = self._klt.coordinates(features)
        if tuple(coordinates.shape[1:3]) != self._codec.grid_hw:
            raise StoreError(f"codec klt, ans: maps of {tuple(coordinates.shape[1:3])}, not of {self._codec.grid_hw}")
        whole, centred = (part.double().square().mean(-1) for part in (coordinates + self._mean, coordinates))
        squares = torch.maximum(whole, centred / SHORTEST_TOKEN**2)
        gains = torch.round(GAINS_PER_OCTAVE / 2 * squares.log2()).clamp(SMALLEST_GAIN, LARGEST_GAIN)
        scaled = self._coefficients.forward(coordinates / gain_values(gains)[..., None]) / self._codec.step
        if not largest_magnitude(scaled) < LARGEST_VALUE:
            # Rare: the maps of this batch whose energy is in one coefficient are coded more coarsely.
            peaks = scaled.abs().amax((1, 2, 3)).cpu().numpy()
            excess = torch.from_numpy(excess_gains(peaks)).to(scaled.device)
            gains = gains + excess[:, None, None]
            if not largest_magnitude(gains) <= LARGEST_GAIN:
                raise not_finite(largest_magnitude(coordinates) * self._codec.basis.phi)
            scaled = scaled / gain_values(excess)[:, None, None, None]
        magnitude = scaled.abs()
        rounded = torch.floor(magnitude + 1 - self._further).clamp(min=1)
        integers = scaled.sign() * torch.where(magnitude < self._first, 0.0, rounded)
        decoded = self._coefficients.coordinates(gains, integers)
        # The codes stay on the CPU, where shards are written.
        codes = self._codec.pack(gains.to(torch.int16).cpu().numpy(), integers.to(torch.int16).cpu().numpy())
        return self._klt.measured(torch.from_numpy(codes), coordinates, decoded)


class KltAnsDecoder(KltInverse):
    """Entropy decoding on the CPU, then the inverse DCT and gains on the device."""

    def __init__(self, codec: KltAns, device: torch.device) -> None:
        super().__init__(codec.basis, device)
        self._codec, self._device, self._coefficients = codec, device, _Coefficients(codec, device)

    def coordinates(self, codes: Tensor) -> Float[Tensor, "b h w c"]:
        gains, integers = (torch.from_numpy(part).to(self._device) for part in self._codec.unpack(codes.cpu().numpy()))
        return self._coefficients.coordinates(gains, integers)

    def axis_transforms(self, grid_hw: tuple[int, int]) -> None:
        # A gain per token comes after the inverse DCT, so crops cannot be cut from coefficients.
        return None


def gain_values(gains: Tensor) -> Tensor:
    """Return the gains of codes."""
    return torch.exp2(gains.float() / GAINS_PER_OCTAVE)


def along_axes(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Multiply maps (b, h, w, c) by matrices along rows (k, h) and columns (l, w)."""
    # (l, w) @ (b, h, w, c) -> (b, h, l, c); (k, h) @ (b, h, l * c) -> (b, k, l * c)
    along_columns = torch.matmul(columns, maps)
    return torch.matmul(rows, along_columns.flatten(-2)).unflatten(-1, (columns.shape[0], maps.shape[-1]))
