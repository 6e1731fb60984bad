"""The interface that every codec implements, and the records that its calibration takes and returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from radio_cache.codecs.klt_basis import KltBasis
from radio_cache.statistics.fidelity import Fidelity
from radio_cache.statistics.moments import Moments

Needs = Literal["nothing", "tokens", "covariance", "maps"]
"""Input of a calibration: no sample, a sample of any size, enough tokens to estimate a covariance, or these and whole maps."""

COVARIANCE: frozenset[Needs] = frozenset({"covariance", "maps"})
"""Needs of enough tokens to estimate a covariance."""

TOKEN_AXES = ("token_row", "token_column")
"""First two axes of a stored map in which the codes of each token lie together."""


@dataclass(frozen=True, kw_only=True)
class CalibrationTarget:
    """The loss that a calibration may accept.

    Args:
        fidelity: mean cosine of decoded and true tokens that the user requested.
        cosine: mean cosine to reach on held-out tokens, a little above `fidelity`.
        step: quantiser step in units of phi, instead of a fidelity; None without one.
    """

    fidelity: float
    cosine: float
    step: float | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class CalibrationMaps:
    """Whole maps of a calibration sample, for codecs that transform rows and columns. Padding is in them.

    Args:
        fitted: (n, h, w, c) features of calibration images; coordinates where the sample has a basis.
        held_out: (m, h, w, c) the same of other images.
        valid: (m, h, w) tokens of the held-out maps that show the image.
    """

    fitted: NDArray[np.float32]
    held_out: NDArray[np.float32]
    valid: NDArray[np.bool_]


@dataclass(frozen=True, eq=False, kw_only=True)
class CalibrationSample:
    """Tokens that a codec is calibrated on. Only tokens that show the image are in it, never padding.

    Args:
        moments: of all calibration tokens; None where `basis` is given.
        tokens: (n, c) features of some or all of them; coordinates where `basis` is given.
        held_out: (m, c) the same of other images, to measure the fidelity on.
        basis: channel transform that the codec has to take over, as the copy of a stored teacher does.
        maps: whole maps of some of the images; None without.
    """

    moments: Moments | None
    tokens: NDArray[np.float32]
    held_out: NDArray[np.float32]
    basis: KltBasis | None = None
    maps: CalibrationMaps | None = None


@dataclass(frozen=True)
class Calibrated:
    """A calibrated codec and its fidelity on held-out tokens."""

    codec: "Codec"
    fidelity: Fidelity


class ChannelTransform(Protocol):
    """The affine last step of decoding: features = mean + matrix @ coordinates, token by token."""

    @property
    def mean(self) -> NDArray[np.float32]:
        """(c,) features of the coordinates 0."""
        ...

    @property
    def matrix(self) -> NDArray[np.float64]:
        """(c, c) features per coordinate, in columns."""
        ...


class Transcodable(Protocol):
    """A codec whose coordinates another packing can encode, without a detour by the features.

    All packings of one codec name share the channel transform, so going over rounds once and rotates nothing.
    """

    @property
    def basis(self) -> KltBasis:
        """The channel transform that the packings share."""
        ...

    def coordinates(self, codes: NDArray[Any], /) -> NDArray[np.float32]:
        """Decode codes (..., *row_shape) to coordinates of tokens (..., h, w, c)."""
        ...

    def codes_of(self, coordinates: NDArray[np.float32], /) -> NDArray[Any]:
        """Encode coordinates of tokens (..., h, w, c) to codes (..., *row_shape)."""
        ...


class Codec(Protocol):
    """Interface of every codec; one test body runs over all of `radio_cache.codecs.CODECS`.

    A codec is a small frozen value: what the cache stores of it (`to_json`, `arrays`) is all that it is.
    """

    needs: ClassVar[Needs]
    """Input of its calibration."""

    reaches_fidelity: ClassVar[bool]
    """True if calibration chooses the number of bits by a requested fidelity or step."""

    @property
    def name(self) -> str:
        """First part of the key in `CODECS`, as users type it."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored codes, little-endian."""
        ...

    @property
    def fill_value(self) -> float:
        """Value that never fills the codes of a whole image, so that every Zarr reader can see a hole in the store."""
        ...

    @property
    def zstd_level(self) -> int | None:
        """Level of Zarr's `zstd` codec between `bytes` and `crc32c`; None for chunks of plain bytes."""
        ...

    @property
    def row_axes(self) -> tuple[str, ...]:
        """Names of the axes of `row_shape`. They begin with `TOKEN_AXES` if each token can be decoded by itself."""
        ...

    @property
    def channel_transform(self) -> ChannelTransform | None:
        """The affine last step of decoding; None if coordinates are features."""
        ...

    @property
    def transcodable(self) -> Transcodable | None:
        """The codec itself if it has several packings; None otherwise."""
        ...

    def row_shape(self, grid_hw: tuple[int, int], channels: int) -> tuple[int, ...]:
        """Return the stored shape of one image's map."""
        ...

    def encode(self, features: NDArray[np.float32], /) -> NDArray[Any]:
        """Encode features (..., h, w, c) to codes (..., *row_shape).

        Raises:
            CodecError: for values outside the codec's error bound.
        """
        ...

    def decode(self, codes: NDArray[Any], /) -> NDArray[np.float32]:
        """Decode codes (..., *row_shape) to float32 features (..., h, w, c)."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return the name, the packing if there are several, and the scalar parameters."""
        ...

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays that decoding needs, by name; stored below the teacher's `transform/`."""
        ...

    @classmethod
    def from_json(cls, data: dict[str, Any], arrays: Mapping[str, NDArray[Any]], /) -> "Codec":
        """Build the codec from what `to_json` and `arrays` returned.

        Raises:
            StoreError: for missing arrays and for parameters that no codec has.
        """
        ...

    @classmethod
    def calibrate(cls, target: CalibrationTarget, sample: CalibrationSample, /) -> Calibrated:
        """Choose the parameters on a sample of a teacher's tokens and measure their fidelity on the held-out ones.

        Raises:
            CodecError: if the sample has too few tokens, or the target cannot be reached.
        """
        ...


def is_tokenwise(codec: Codec) -> bool:
    """Return whether codes (h, w, k) of a map can be decoded token by token."""
    return codec.row_axes[:2] == TOKEN_AXES
