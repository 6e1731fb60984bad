"""Fixed-width klt: block gains and a few bits per channel, unpacked by shifts. No entropy decoding, so no work for the CPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from radio_cache.codecs.base import TOKEN_AXES, Calibrated, CalibrationSample, CalibrationTarget, Needs
from radio_cache.codecs.bit_allocation import bit_order, lloyd
from radio_cache.codecs.klt_basis import KltBasis
from radio_cache.codecs.klt_calibration import KltSample, refuse_if_below, smallest_enough
from radio_cache.codecs.klt_gains import GAIN_BITS, LARGEST_GAIN, gain_codes, gain_values, group_starts
from radio_cache.codecs.klt_zstd import fidelity_of_step
from radio_cache.codecs.limits import not_finite
from radio_cache.errors import StoreError
from radio_cache.statistics.fidelity import Fidelity

MAX_WIDTH = 10
"""Bits of the widest channel."""

LARGEST_RELATIVE = 2.0**31
"""The largest |y| / scale that can be stored; its gain is below the largest, whatever the limit."""

_LIMIT = 6.0
"""Smallest limit of a channel, in its scales after the gain."""

_OVERSHOOT = 1.5
"""Limit of a channel relative to its outermost level."""

_TABLE_SAMPLES = 300_000
_ALLOCATION_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class KltPacked:
    """Divide coordinates y of `KltBasis` by the gain of their group, and store each as the number of the nearest level.

    There are four groups of neighbouring channels. Each channel has `widths` bits, and each width a table of levels.

    A token's gains take out what varies from token to token, so the levels can be few: heavy tails are mostly loud
    tokens. Widths are chosen by measured error on calibration tokens, tables by Lloyd's algorithm. A token is
    ceil((7 groups + sum of widths) / 8) bytes: gains first, then channels, bits from the lowest up.
    Bound: |y' - y| <= gain * scale * `worst_error[width]` for channels with bits; the gain grows until no value is more
    than 1.5 of the outermost level (or 6) away, so nothing saturates without bound. Values beyond 2^31 scales raise CodecError.
    Channels without bits decode to 0. A build measures the loss and records it in the receipts.

    Args:
        widths: (c,) uint8, bits of each channel.
        scales: (c,) float32, root mean square of each channel after its gain, in units of phi.
        levels: (2046,) float32, tables of 2, 4 ... 1024 levels.
    """

    needs: ClassVar[Needs] = "covariance"
    reaches_fidelity: ClassVar[bool] = True

    basis: KltBasis
    widths: NDArray[np.uint8]
    scales: NDArray[np.float32]
    levels: NDArray[np.float32]

    @property
    def name(self) -> str:
        """Name on the command line: "klt"."""
        return "klt"

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8: bytes of packed bits."""
        return np.dtype("uint8")

    @property
    def fill_value(self) -> float:
        """255: it would be gain code 127 of the first group, which is never emitted."""
        return 255

    @property
    def zstd_level(self) -> int | None:
        """None: the widths are fitted already, so that zstd saves little."""
        return None

    @property
    def row_axes(self) -> tuple[str, ...]:
        """Tokens and their bytes."""
        return (*TOKEN_AXES, "code")

    @property
    def channel_transform(self) -> KltBasis:
        """The rotation back to features."""
        return self.basis

    @property
    def transcodable(self) -> "KltPacked":
        """The codec itself: its coordinates are those of klt/zstd."""
        return self

    def row_shape(self, grid_hw: tuple[int, int], channels: int) -> tuple[int, ...]:
        """Return (h, w, token_bytes)."""
        del channels  # they follow from the widths
        return (*grid_hw, self.token_bytes)

    @cached_property
    def group_starts(self) -> NDArray[np.int64]:
        """(groups,) first channel of every gain group."""
        return group_starts(self.basis.channels)

    @cached_property
    def group_of(self) -> NDArray[np.int64]:
        """(c,) gain group of every channel."""
        return np.searchsorted(self.group_starts, np.arange(self.basis.channels), side="right") - 1

    @cached_property
    def bit_starts(self) -> NDArray[np.int64]:
        """(c,) first bit of every channel within a token."""
        # The running sum includes each channel's own width, which starts after the bit in question.
        return GAIN_BITS * len(self.group_starts) + np.cumsum(self.widths.astype(np.int64)) - self.widths

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        # Summed in int64: uint8 widths would wrap around.
        bits = GAIN_BITS * len(self.group_starts) + int(self.widths.sum(dtype=np.int64))
        return -(-bits // 8)

    @cached_property
    def bit_sources(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Field of every bit of a token (gains, then channels, then one that is 0), and the bit's number in that field."""
        lengths = np.concatenate([np.full(len(self.group_starts), GAIN_BITS), self.widths.astype(np.int64)])
        fields = np.repeat(np.arange(len(lengths)), lengths)
        starts = np.cumsum(lengths) - lengths
        bits = np.arange(len(fields)) - starts[fields]
        padding = 8 * self.token_bytes - len(fields)  # up to 7 bits of the last byte, taken from the field of zeros
        return np.append(fields, np.full(padding, len(lengths))), np.append(bits, np.zeros(padding, np.int64))

    @cached_property
    def limits(self) -> NDArray[np.float32]:
        """(c,) largest |y| / (gain scale) that leaves the gain as it is; infinite for channels without bits."""
        by_width = [np.inf] + [
            max(_LIMIT, _OVERSHOOT * float(np.abs(level_table(self.levels, b)).max())) for b in range(1, MAX_WIDTH + 1)
        ]
        return np.array(by_width, np.float32)[self.widths]

    @cached_property
    def worst_error(self) -> NDArray[np.float32]:
        """(MAX_WIDTH + 1,) largest |y' - y| / (gain scale) by width; index 0 is infinite."""
        errors = [np.inf]
        for b in range(1, MAX_WIDTH + 1):
            table = level_table(self.levels, b)
            outer = float(np.abs(table).max())
            errors.append(
                max(float(np.diff(table).max()) / 2, max(_LIMIT, _OVERSHOOT * outer) - min(-table[0], table[-1]))
            )
        return np.array(errors, np.float32)

    def encode(self, features: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Encode features (..., h, w, c) to bytes (..., h, w, token_bytes).

        Raises:
            CodecError: for values beyond 2^31 scales, infinity and NaN.
        """
        return self.codes_of(self.basis.forward(features))

    def codes_of(self, coordinates: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Encode coordinates (..., c) to stored bytes (..., token_bytes)."""
        return self.pack(*self.quantise(coordinates))

    def pack(self, gains: NDArray[np.int32], codes: NDArray[np.int32]) -> NDArray[np.uint8]:
        """Pack gain codes (..., groups) and level numbers (..., c) into stored bytes (..., token_bytes)."""
        fields, bits = self.bit_sources
        # (..., groups + c + 1): the last field is 0 and fills the last byte.
        values = np.concatenate([gains, codes, np.zeros_like(gains[..., :1])], axis=-1)
        return np.packbits(((values[..., fields] >> bits) & 1).astype(np.uint8), axis=-1, bitorder="little")

    def decode(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Decode bytes (..., h, w, token_bytes) to features (..., h, w, c)."""
        return self.basis.inverse(self.coordinates(codes))

    def quantise(self, coordinates: NDArray[np.float32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Quantise coordinates (..., c) to gain codes (..., groups) and level numbers (..., c).

        Raises:
            CodecError: for values beyond 2^31 scales.
        """
        relative = np.abs(coordinates) / self.scales
        if not relative.max(initial=0) < LARGEST_RELATIVE:
            raise not_finite(float(np.abs(coordinates).max()) * self.basis.phi)
        # (..., c) -> (..., groups)
        power = np.add.reduceat(np.square(relative), self.group_starts, axis=-1)
        sizes = np.diff(np.append(self.group_starts, self.basis.channels))
        loudest = np.maximum.reduceat(relative / self.limits, self.group_starts, axis=-1)
        gains = gain_codes(np.sqrt(power / sizes), loudest)
        normalised = coordinates / (self.scales * gain_values(gains)[..., self.group_of])
        codes = np.zeros(coordinates.shape, np.int32)
        # All channels of one width share a table, so ten searches are enough whatever the number of channels.
        for width in np.unique(self.widths[self.widths > 0]):
            channels = np.flatnonzero(self.widths == width)
            table = level_table(self.levels, int(width))
            codes[..., channels] = np.searchsorted((table[1:] + table[:-1]) / 2, normalised[..., channels])
        return gains, codes

    def coordinates(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Decode stored bytes (..., token_bytes) to coordinates (..., c)."""
        groups = len(self.group_starts)
        bits = np.unpackbits(codes, axis=-1, bitorder="little")
        # Bits times powers of two, summed from each field's first bit to the next field's: reduceat adds up to the next start.
        weights = np.int32(1) << self.bit_sources[1].astype(np.int32)
        starts = np.concatenate([GAIN_BITS * np.arange(groups), self.bit_starts[self.widths > 0]])
        # Channels without bits have no start of their own, and stay 0.
        fields = np.add.reduceat(bits * weights, starts, axis=-1, dtype=np.int32)
        numbers = np.zeros((*codes.shape[:-1], self.basis.channels), np.int32)
        numbers[..., self.widths > 0] = fields[..., groups:]
        # Damaged bytes may hold the gain code that marks a hole.
        return self.dequantise(np.minimum(fields[..., :groups], LARGEST_GAIN), numbers)

    def dequantise(self, gains: NDArray[np.int32], codes: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return the coordinates (..., c) of gain codes (..., groups) and level numbers (..., c)."""
        # The tables of 2, 4, 8 ... levels lie one after the other: width b starts at 2^b - 2.
        offsets = np.maximum((1 << self.widths.astype(np.int32)) - 2, 0)
        scales = np.where(self.widths > 0, self.scales, np.float32(0))
        return self.levels[codes + offsets] * (scales * gain_values(gains)[..., self.group_of])

    def to_json(self) -> dict[str, Any]:
        """Return name and packing."""
        return {"name": self.name, "packing": "packed"}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the basis, widths, scales and levels."""
        return {**self.basis.arrays(), "widths": self.widths, "scales": self.scales, "levels": self.levels}

    @classmethod
    def from_json(cls, data: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> "KltPacked":
        """Build the codec from its arrays.

        Raises:
            StoreError: for missing arrays, shapes that do not fit together, and widths beyond `MAX_WIDTH`.
        """
        del data  # all parameters are in the arrays
        basis = KltBasis.from_arrays(arrays)
        try:
            widths, scales, levels = (arrays[name] for name in ("widths", "scales", "levels"))
        except KeyError as exc:
            raise StoreError(f"codec klt, packed: the array {exc} is missing") from exc
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

    @classmethod
    def calibrate(cls, target: CalibrationTarget, sample: CalibrationSample) -> Calibrated:
        """Spend the fewest bits that reach the target; of a step, the fidelity that it has under zstd is the target."""
        klt = KltSample.of(sample)
        plan = PackedPlan.fit(klt.basis, klt.coordinates)

        def fidelity_at(bits: int) -> Fidelity:
            codec = plan.codec(bits)
            return klt.fidelity_of(codec.dequantise(*codec.quantise(klt.held_out)))

        cosine = target.cosine if target.step is None else fidelity_of_step(klt, target.step).cosine
        most_bits = MAX_WIDTH * klt.basis.channels
        # More bits keep more, because `order` only ever adds bits: the search may halve.
        bits = smallest_enough(lambda bits: fidelity_at(bits).cosine >= cosine, most_bits)
        if bits > most_bits:
            refuse_if_below(target, fidelity_at(most_bits))
        return Calibrated(plan.codec(bits), fidelity_at(bits))


def level_table(levels: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Return the 2^width levels of a width, ascending."""
    first = (1 << width) - 2  # 2 + 4 + ... + 2^(width - 1) levels lie before
    return levels[first : first + (1 << width)]


@dataclass(frozen=True, eq=False)
class PackedPlan:
    """The part of a calibration that all fidelities share: scales, tables, and the channel that gets the next bit.

    Args:
        order: channels in the order in which they get their bits; its first k entries distribute k bits best.
    """

    basis: KltBasis
    scales: NDArray[np.float32]
    levels: NDArray[np.float32]
    order: NDArray[np.int64]

    @classmethod
    def fit(cls, basis: KltBasis, coordinates: NDArray[np.float32]) -> "PackedPlan":
        """Fit scales, tables and order to the coordinates (n, c) of calibration tokens."""
        starts = group_starts(basis.channels)
        sizes = np.diff(np.append(starts, basis.channels))
        deviations = np.sqrt(basis.eigenvalues) / np.float32(basis.phi)
        # (n, groups): magnitude of each group of a token, relative to the average token's
        rms = np.sqrt(np.add.reduceat(np.square(coordinates / deviations), starts, axis=-1) / sizes)
        group_of = np.repeat(np.arange(len(starts)), sizes)
        # (n, c): the gain of each channel's group
        gains = gain_values(np.minimum(gain_codes(rms, np.zeros_like(rms)), LARGEST_GAIN))[:, group_of]
        normalised = coordinates / gains
        # A channel that is nearly constant in the sample gets a floor, so that dividing by its scale stays finite.
        scales = np.maximum(np.sqrt(np.square(normalised).mean(axis=0)), 1e-3 * deviations).astype(np.float32)
        normalised /= scales
        rng = np.random.default_rng(0)
        # One set of tables for all channels: after gains and scales their distributions are nearly alike.
        pool = normalised.ravel()
        pool = pool[rng.permutation(len(pool))[:_TABLE_SAMPLES]] if len(pool) > _TABLE_SAMPLES else pool
        tables = [lloyd(pool, width) for width in range(1, MAX_WIDTH + 1)]
        rows = rng.permutation(len(coordinates))[:_ALLOCATION_TOKENS]
        # Errors count relative to the length of the whole token, mean included, because a cosine does, too.
        lengths = np.linalg.norm(coordinates[rows] + basis.rotated_mean, axis=-1, keepdims=True)
        importance = np.square(gains[rows] * scales / np.maximum(lengths, 1e-6 * lengths.max()))
        order = bit_order(normalised[rows], importance, tables)
        return cls(basis, scales, np.concatenate(tables).astype(np.float32), order)

    def codec(self, bits: int) -> KltPacked:
        """Return the codec that gives a token's channels `bits` bits, rounded up so that the token fills its last byte."""
        gain_bits = GAIN_BITS * len(group_starts(self.basis.channels))
        channel_bits = -(-(bits + gain_bits) // 8) * 8 - gain_bits
        # A channel's width is the number of times that it occurs among the first bits.
        widths = np.bincount(self.order[:channel_bits], minlength=self.basis.channels).astype(np.uint8)
        return KltPacked(self.basis, widths, self.scales, self.levels)
