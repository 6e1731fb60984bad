"""Choosing a codec's parameters on a sample of a teacher's tokens, and saying what they cost."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import zstandard
from numpy.typing import NDArray

from radio_cache.codecs import Codec
from radio_cache.codecs.half import Half
from radio_cache.codecs.int8 import Int8
from radio_cache.codecs.klt_basis import KltBasis
from radio_cache.codecs.klt_packed import MAX_WIDTH, PackedPlan
from radio_cache.codecs.klt_zstd import KltZstd, fits_nibbles
from radio_cache.errors import CodecError, ConfigError, unknown_name
from radio_cache.statistics.fidelity import Fidelity, measure
from radio_cache.statistics.moments import Moments

CodecName = Literal["half", "int8", "klt"]
Packing = Literal["packed", "zstd"]

_TESTED_TOKENS = 8192
_MARGIN = 0.05
"""Held-out tokens are a sample too: calibration stops at a loss of 95 % of what was allowed."""
_HEAP_HW = (8, 8)
"""Tokens that are compressed together to see which layout is smaller."""

_SMALLEST_STEP, _LARGEST_STEP = 1e-3, 8.0


@dataclass(frozen=True, kw_only=True)
class CodecRequest:
    """What a user asks of the stored numbers. fidelity: mean cosine on held-out tokens; step: klt's, in units of phi,
    instead of a fidelity. Both and the packing say something about klt only."""

    name: CodecName = "klt"
    packing: Packing = "packed"
    fidelity: float = 0.99
    step: float | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(CodecName):
            raise ConfigError(unknown_name("codec", self.name, get_args(CodecName)))
        if self.packing not in get_args(Packing):
            raise ConfigError(unknown_name("packing", self.packing, get_args(Packing)))
        if not 0.5 <= self.fidelity < 1:
            raise ConfigError(
                f"fidelity {self.fidelity:g} is a mean cosine: from 0.5 to below 1, such as 0.99 or 0.999"
            )
        if self.step is not None and not _SMALLEST_STEP <= self.step <= _LARGEST_STEP:
            raise ConfigError(f"step {self.step:g} is outside {_SMALLEST_STEP:g} to {_LARGEST_STEP:g}")

    @property
    def target(self) -> float:
        """The mean cosine that calibration aims at, a little above the fidelity asked for."""
        return 1 - (1 - self.fidelity) * (1 - _MARGIN)

    @property
    def needs_calibration(self) -> bool:
        return self.name != "half"

    def to_json(self) -> dict[str, Any]:
        """What decides the stored bytes: settings that say nothing about the codec are left out."""
        if self.name != "klt":
            return {"name": self.name}
        fields = asdict(self)
        del fields["fidelity" if self.step is not None else "step"]
        return fields


@dataclass(frozen=True)
class Calibrated:
    """A codec, and what it measured on held-out tokens."""

    codec: Codec
    fidelity: Fidelity


def calibrate(
    request: CodecRequest, moments: Moments, tokens: NDArray[np.float32], held_out: NDArray[np.float32]
) -> Calibrated:
    """The codec that was asked for.

    moments: of all calibration tokens. tokens (n, c): some or all of them; held_out (m, c): tokens of other images.
    Raises CodecError, with the cure, if the fidelity cannot be reached.
    """
    if len(held_out) > _TESTED_TOKENS:
        held_out = held_out[np.random.default_rng(0).permutation(len(held_out))[:_TESTED_TOKENS]]
    if request.name == "half":
        return Calibrated(Half(), measure(held_out, Half().decode(Half().encode(held_out))))
    if request.name == "int8":
        int8 = Int8.fit(tokens)
        return Calibrated(int8, measure(held_out, int8.decode(int8.encode(held_out))))
    basis = KltBasis.fit(moments)
    return calibrate_klt(request, basis, basis.forward(tokens), basis.forward(held_out))


def calibrate_klt(
    request: CodecRequest, basis: KltBasis, coordinates: NDArray[np.float32], held_out: NDArray[np.float32]
) -> Calibrated:
    """The klt codec that was asked for, in a basis that is known. coordinates, held_out: of tokens in that basis."""
    if request.packing == "zstd":
        return _zstd(request, basis, held_out)
    return _packed(request, basis, coordinates, held_out)


def _zstd(request: CodecRequest, basis: KltBasis, coordinates: NDArray[np.float32]) -> Calibrated:
    def measured(step: float) -> Fidelity:
        codec = KltZstd(basis, step)
        return measure_coordinates(basis, coordinates, codec.dequantise(*codec.quantise(coordinates)))

    step = request.step
    if step is None:
        low, high = np.log(_SMALLEST_STEP), np.log(_LARGEST_STEP)
        _refuse_if_below(request, measured(_SMALLEST_STEP))
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if measured(float(np.exp(middle))).cosine >= request.target else (low, middle)
        step = float(np.exp(low))
    return Calibrated(_smallest_layout(basis, step, coordinates), measured(step))


def _smallest_layout(basis: KltBasis, step: float, coordinates: NDArray[np.float32]) -> KltZstd:
    """The layout in which these tokens take the fewest bytes, in heaps of about an image each."""
    codec = KltZstd(basis, step)
    if not fits_nibbles(step, basis.channels):
        return codec
    count = min(len(coordinates), _TESTED_TOKENS) // math.prod(_HEAP_HW) * math.prod(_HEAP_HW)
    heaps = coordinates[:count].reshape(-1, *_HEAP_HW, basis.channels) if count else coordinates[None, :, None]
    others = (codec, replace(codec, layout="nibbles"))
    return min(others, key=lambda one: _compressed_bytes(one, heaps))


def _compressed_bytes(codec: KltZstd, maps: NDArray[np.float32]) -> int:
    compressor = zstandard.ZstdCompressor(level=codec.level)
    return sum(len(compressor.compress(row.tobytes())) for row in codec.codes_of(maps))


def _packed(
    request: CodecRequest, basis: KltBasis, coordinates: NDArray[np.float32], held_out: NDArray[np.float32]
) -> Calibrated:
    plan = PackedPlan.fit(basis, coordinates)

    def measured(bits: int) -> Fidelity:
        return measure_coordinates(basis, held_out, _through(plan, bits, held_out))

    wanted = request.target if request.step is None else _zstd(request, basis, held_out).fidelity.cosine
    most = MAX_WIDTH * basis.channels
    bits = _smallest(lambda bits: measured(bits).cosine >= wanted, most)
    if bits > most:
        _refuse_if_below(request, measured(most))
    codec = plan.codec(bits)
    return Calibrated(codec, measured(bits))


def _through(plan: PackedPlan, bits: int, coordinates: NDArray[np.float32]) -> NDArray[np.float32]:
    codec = plan.codec(bits)
    gains, codes = codec.quantise(coordinates)
    return codec.dequantise(gains, codes)


def _smallest(enough: Callable[[int], bool], most: int) -> int:
    """The smallest number up to `most` that is enough, most + 1 if none is; `enough` is monotone."""
    low, high = 0, most + 1
    while low < high:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _refuse_if_below(request: CodecRequest, best: Fidelity) -> None:
    if best.cosine < request.target:
        raise CodecError(
            f"klt cannot reach fidelity {request.fidelity:g} on this teacher: at its finest it keeps {best.cosine:.5f} on "
            "held-out images. Ask for less, calibrate on more images, or take --codec half"
        )


def measure_coordinates(basis: KltBasis, coordinates: NDArray[np.float32], decoded: NDArray[np.float32]) -> Fidelity:
    """Fidelity of coordinates (n, c): the same as of the features, since a rotation changes no angle and no length."""
    return measure(coordinates + basis.rotated_mean, decoded + basis.rotated_mean)
