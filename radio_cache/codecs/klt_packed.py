"""Fixed-width klt: block gains and a few bits per channel, unpacked by shifts. No entropy decoding, no work for the CPU."""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radio_cache.codecs.klt_basis import KltBasis, not_finite
from radio_cache.errors import StoreError

MAX_WIDTH = 10
"""Bits of the widest channel."""

GAIN_BITS = 7
GAINS_PER_OCTAVE = 2
GAIN_OF_ONE = 63
"""Gain code g means 2^((g - 63) / 2): 2^-31.5 to 2^31.5. Code 127 of the first group is never emitted: it marks a hole."""

LARGEST_GAIN = 126
LARGEST_RELATIVE = 2.0**31
"""The largest |y| / scale that is kept; its gain is below the largest, whatever the limit."""

_GROUPS = 4
_LIMIT = 6.0
_OVERSHOOT = 1.5
_TABLE_SAMPLES = 300_000
_ALLOCATION_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class KltPacked:
    """Coordinates y of `KltBasis` in four groups of neighbouring channels, each divided by its own gain; then every
    channel keeps `widths` bits, the number of the nearest level in the table for that width.

    A token's gains take out what varies from token to token, so the levels can be few: heavy tails are mostly loud
    tokens. Widths are chosen by measured error on calibration tokens, tables by Lloyd's algorithm. A token is
    ceil((7 groups + sum of widths) / 8) bytes: gains first, then channels, bits from the lowest up.
    Bound: |y' - y| <= gain * scale * `worst_error[width]` for channels with bits; the gain grows until no value is more
    than 1.5 of the outermost level (or 6) away, so nothing saturates without bound. Values beyond 2^31 scales raise CodecError.
    Channels without bits decode to 0. What it costs is measured while building, and kept in the receipts.

    widths (c,) uint8; scales (c,) float32, in units of phi; levels (2046,) float32: tables of 2, 4 ... 1024 levels.
    """

    basis: KltBasis
    widths: NDArray[np.uint8]
    scales: NDArray[np.float32]
    levels: NDArray[np.float32]

    @property
    def name(self) -> str:
        return "klt"

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("uint8")

    @property
    def fill_value(self) -> float:
        return 255

    @property
    def zstd_level(self) -> int | None:
        return None

    def row_shape(self, grid_hw: tuple[int, int], channels: int) -> tuple[int, ...]:
        del channels  # the basis knows
        return (*grid_hw, self.token_bytes)

    @cached_property
    def group_starts(self) -> NDArray[np.int64]:
        """First channel of every gain group."""
        return group_starts(self.basis.channels)

    @cached_property
    def group_of(self) -> NDArray[np.int64]:
        """(c,) gain group of every channel."""
        return np.searchsorted(self.group_starts, np.arange(self.basis.channels), side="right") - 1

    @cached_property
    def bit_starts(self) -> NDArray[np.int64]:
        """(c,) first bit of every channel within a token."""
        return GAIN_BITS * len(self.group_starts) + np.cumsum(self.widths.astype(np.int64)) - self.widths

    @cached_property
    def token_bytes(self) -> int:
        bits = GAIN_BITS * len(self.group_starts) + int(self.widths.sum(dtype=np.int64))
        return -(-bits // 8)

    @cached_property
    def bit_sources(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For every bit of a token: which field it is of (gains, then channels, then one that is 0), and which bit of it."""
        lengths = np.concatenate([np.full(len(self.group_starts), GAIN_BITS), self.widths.astype(np.int64)])
        fields = np.repeat(np.arange(len(lengths)), lengths)
        starts = np.cumsum(lengths) - lengths
        bits = np.arange(len(fields)) - starts[fields]
        padding = 8 * self.token_bytes - len(fields)
        return np.append(fields, np.full(padding, len(lengths))), np.append(bits, np.zeros(padding, np.int64))

    @cached_property
    def limits(self) -> NDArray[np.float32]:
        """(c,) the largest |y| / (gain scale) that does not make the gain grow; infinite for channels without bits."""
        by_width = [np.inf] + [
            max(_LIMIT, _OVERSHOOT * float(np.abs(level_table(self.levels, b)).max())) for b in range(1, MAX_WIDTH + 1)
        ]
        return np.array(by_width, np.float32)[self.widths]

    @cached_property
    def worst_error(self) -> NDArray[np.float32]:
        """(MAX_WIDTH + 1,) by width: the largest |y' - y| / (gain scale); index 0 is infinite."""
        errors = [np.inf]
        for b in range(1, MAX_WIDTH + 1):
            table = level_table(self.levels, b)
            outer = float(np.abs(table).max())
            errors.append(
                max(float(np.diff(table).max()) / 2, max(_LIMIT, _OVERSHOOT * outer) - min(-table[0], table[-1]))
            )
        return np.array(errors, np.float32)

    def encode(self, features: NDArray[np.float32]) -> NDArray[np.uint8]:
        return self.codes_of(self.basis.forward(features))

    def codes_of(self, coordinates: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Coordinates (..., c) as stored: (..., token_bytes)."""
        return self.pack(*self.quantise(coordinates))

    def pack(self, gains: NDArray[np.int32], codes: NDArray[np.int32]) -> NDArray[np.uint8]:
        """Gain codes (..., groups) and level numbers (..., c) as stored: (..., token_bytes)."""
        fields, bits = self.bit_sources
        values = np.concatenate([gains, codes, np.zeros_like(gains[..., :1])], axis=-1)
        return np.packbits(((values[..., fields] >> bits) & 1).astype(np.uint8), axis=-1, bitorder="little")

    def decode(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.basis.inverse(self.coordinates(codes))

    def quantise(self, coordinates: NDArray[np.float32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Coordinates (..., c) to gain codes (..., groups) and level numbers (..., c)."""
        relative = np.abs(coordinates) / self.scales
        if not relative.max(initial=0) < LARGEST_RELATIVE:
            raise not_finite(float(np.abs(coordinates).max()) * self.basis.phi)
        power = np.add.reduceat(np.square(relative), self.group_starts, axis=-1)
        sizes = np.diff(np.append(self.group_starts, self.basis.channels))
        loudest = np.maximum.reduceat(relative / self.limits, self.group_starts, axis=-1)
        gains = gain_codes(np.sqrt(power / sizes), loudest)
        normalised = coordinates / (self.scales * gain_values(gains)[..., self.group_of])
        codes = np.zeros(coordinates.shape, np.int32)
        for width in np.unique(self.widths[self.widths > 0]):
            channels = np.flatnonzero(self.widths == width)
            table = level_table(self.levels, int(width))
            codes[..., channels] = np.searchsorted((table[1:] + table[:-1]) / 2, normalised[..., channels])
        return gains, codes

    def coordinates(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Stored bytes (..., token_bytes) to coordinates (..., c)."""
        groups = len(self.group_starts)
        bits = np.unpackbits(codes, axis=-1, bitorder="little")
        weights = np.int32(1) << self.bit_sources[1].astype(np.int32)
        starts = np.concatenate([GAIN_BITS * np.arange(groups), self.bit_starts[self.widths > 0]])
        fields = np.add.reduceat(bits * weights, starts, axis=-1, dtype=np.int32)
        numbers = np.zeros((*codes.shape[:-1], self.basis.channels), np.int32)
        numbers[..., self.widths > 0] = fields[..., groups:]
        return self.dequantise(np.minimum(fields[..., :groups], LARGEST_GAIN), numbers)

    def dequantise(self, gains: NDArray[np.int32], codes: NDArray[np.int32]) -> NDArray[np.float32]:
        """Gain codes (..., groups) and level numbers (..., c) to coordinates (..., c)."""
        offsets = np.maximum((1 << self.widths.astype(np.int32)) - 2, 0)
        scales = np.where(self.widths > 0, self.scales, np.float32(0))
        return self.levels[codes + offsets] * (scales * gain_values(gains)[..., self.group_of])

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "packing": "packed"}

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {**self.basis.arrays(), "widths": self.widths, "scales": self.scales, "levels": self.levels}

    @classmethod
    def from_json(cls, data: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> "KltPacked":
        del data  # nothing but the name and the packing
        basis = KltBasis.from_arrays(arrays)
        try:
            widths, scales, levels = (arrays[name] for name in ("widths", "scales", "levels"))
        except KeyError as exc:
            raise StoreError(f"codec klt, packed: the array {exc} is not there") from exc
        if (
            widths.shape != basis.mean.shape
            or scales.shape != basis.mean.shape
            or levels.shape != (2 ** (MAX_WIDTH + 1) - 2,)
        ):
            raise StoreError(
                f"codec klt, packed: widths {widths.shape}, scales {scales.shape} and levels {levels.shape} do not fit "
                f"{basis.channels} channels"
            )
        if widths.max(initial=0) > MAX_WIDTH or widths.min(initial=0) < 0:
            raise StoreError(
                f"codec klt, packed: a channel has {int(widths.max())} bits, the most there can be is {MAX_WIDTH}"
            )
        return cls(basis, widths.astype(np.uint8), scales.astype(np.float32), levels.astype(np.float32))


def group_starts(channels: int) -> NDArray[np.int64]:
    """First channel of every gain group: four of about equal size, one where there are few channels."""
    groups = _GROUPS if channels >= 4 * _GROUPS else 1
    return np.arange(groups) * channels // groups


def gain_codes(rms: NDArray[np.float32], loudest: NDArray[np.float32]) -> NDArray[np.int32]:
    """Codes of the gain nearest to the root mean square of a group, or of the smallest that tames its loudest value."""
    with np.errstate(divide="ignore"):
        nearest = np.rint(GAINS_PER_OCTAVE * np.log2(rms))
        needed = np.ceil(GAINS_PER_OCTAVE * np.log2(loudest))
    # Bounds before the conversion: a silent group has a gain of minus infinity.
    return np.clip(np.maximum(nearest, needed) + GAIN_OF_ONE, 0, 1000).astype(np.int32)


def gain_values(codes: NDArray[np.int32]) -> NDArray[np.float32]:
    """What the codes stand for."""
    return np.exp2((codes - GAIN_OF_ONE).astype(np.float32) / GAINS_PER_OCTAVE)


def level_table(levels: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """The 2^width levels of a width, ascending."""
    first = (1 << width) - 2
    return levels[first : first + (1 << width)]


@dataclass(frozen=True, eq=False)
class PackedPlan:
    """What calibration finds once, for all fidelities: scales, tables, and which channel deserves the next bit.

    order: channels, in the order in which they get their bits; its first k entries are the best spending of k bits.
    """

    basis: KltBasis
    scales: NDArray[np.float32]
    levels: NDArray[np.float32]
    order: NDArray[np.int64]

    @classmethod
    def fit(cls, basis: KltBasis, coordinates: NDArray[np.float32]) -> "PackedPlan":
        """From the coordinates (n, c) of calibration tokens."""
        starts = group_starts(basis.channels)
        sizes = np.diff(np.append(starts, basis.channels))
        deviations = np.sqrt(basis.eigenvalues) / np.float32(basis.phi)
        rms = np.sqrt(np.add.reduceat(np.square(coordinates / deviations), starts, axis=-1) / sizes)
        group_of = np.repeat(np.arange(len(starts)), sizes)
        gains = gain_values(np.minimum(gain_codes(rms, np.zeros_like(rms)), LARGEST_GAIN))[:, group_of]
        normalised = coordinates / gains
        scales = np.maximum(np.sqrt(np.square(normalised).mean(axis=0)), 1e-3 * deviations).astype(np.float32)
        normalised /= scales
        rng = np.random.default_rng(0)
        pool = normalised.ravel()
        pool = pool[rng.permutation(len(pool))[:_TABLE_SAMPLES]] if len(pool) > _TABLE_SAMPLES else pool
        tables = [lloyd(pool, width) for width in range(1, MAX_WIDTH + 1)]
        some = rng.permutation(len(coordinates))[:_ALLOCATION_TOKENS]
        # Errors count relative to the whole token, mean included: that is what a cosine is about.
        loudness = np.linalg.norm(coordinates[some] + basis.rotated_mean, axis=-1, keepdims=True)
        importance = np.square(gains[some] * scales / np.maximum(loudness, 1e-6 * loudness.max()))
        order = _spend(normalised[some], importance, tables)
        return cls(basis, scales, np.concatenate(tables).astype(np.float32), order)

    def codec(self, bits: int) -> KltPacked:
        """The codec that spends `bits` on the channels of a token, and what is left of the last byte."""
        gain_bits = GAIN_BITS * len(group_starts(self.basis.channels))
        whole = -(-(bits + gain_bits) // 8) * 8 - gain_bits
        widths = np.bincount(self.order[:whole], minlength=self.basis.channels).astype(np.uint8)
        return KltPacked(self.basis, widths, self.scales, self.levels)


def lloyd(values: NDArray[np.float32], width: int, rounds: int = 60) -> NDArray[np.float64]:
    """2^width levels of least mean squared error for these values (Lloyd, 1982, method I), ascending and distinct."""
    count = 1 << width
    ordered = np.sort(values.astype(np.float64))
    # Start where theory puts them for many levels: as dense as the cube root of the density (Panter and Dite, 1951).
    density, edges = np.histogram(ordered, 512)
    share = np.cumsum(np.cbrt(density + 1e-2))
    levels = np.interp((np.arange(count) + 0.5) / count * share[-1], share, edges[1:])
    sums = np.concatenate([np.zeros(1), np.cumsum(ordered)])
    for _ in range(rounds):
        ends = np.concatenate([[0], np.searchsorted(ordered, (levels[1:] + levels[:-1]) / 2), [len(ordered)]])
        members = np.diff(ends)
        levels = np.where(members > 0, np.diff(sums[ends]) / np.maximum(members, 1), levels)
        levels = np.sort(levels)
    # Levels of empty cells may coincide; they must not, or a code would have no meaning of its own.
    smallest = 1e-6 * max(float(np.abs(levels).max()), 1e-6)
    return np.maximum.accumulate(levels + smallest * np.arange(count))


def _spend(
    normalised: NDArray[np.float32], importance: NDArray[np.float32], tables: list[NDArray[np.float64]]
) -> NDArray[np.int64]:
    """The channels in the order in which one more bit each lowers the measured error most."""
    errors = [(importance * np.square(normalised)).mean(axis=0)]
    for table in tables:
        nearest = table[np.searchsorted((table[1:] + table[:-1]) / 2, normalised)]
        errors.append((importance * np.square(normalised - nearest)).mean(axis=0))
    savings = _worth(np.stack(errors))
    queue = [(-float(savings[0, channel]), channel) for channel in range(savings.shape[1])]
    heapq.heapify(queue)
    widths = np.zeros(savings.shape[1], np.int64)
    order: list[int] = []
    while queue:
        _, channel = heapq.heappop(queue)
        order.append(channel)
        widths[channel] += 1
        if widths[channel] < MAX_WIDTH:
            heapq.heappush(queue, (-float(savings[widths[channel], channel]), channel))
    return np.array(order)


def _worth(errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """What each further bit is worth, (widths - 1, c), for errors (widths, c) of each width; never more than the one before.

    A first bit may save nothing where a second one saves almost all (zero nearly everywhere, far out elsewhere): both are
    then worth their mean. So these are the slopes of the errors' convex minorant, as in Shoham and Gersho, "Efficient Bit
    Allocation for an Arbitrary Set of Quantizers", 1988; by the min-max formula of isotonic regression.
    """
    bits = len(errors) - 1
    slopes = np.full((bits, bits, errors.shape[1]), -np.inf)  # [a, b]: of the bits from a to b, each
    for a in range(bits):
        for b in range(a, bits):
            slopes[a, b] = (errors[a] - errors[b + 1]) / (b - a + 1)
    worth = np.stack([slopes[: bit + 1, bit:].max(axis=1).min(axis=0) for bit in range(bits)])
    return np.maximum(worth, 0.0)
