"""The request for a codec, and its calibration on a sample of a teacher's tokens."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radio_cache.codecs import CODECS
from radio_cache.codecs.base import Calibrated, CalibrationMaps, CalibrationSample, CalibrationTarget, Codec
from radio_cache.codecs.klt_basis import KltBasis
from radio_cache.codecs.klt_zstd import LARGEST_STEP, SMALLEST_STEP
from radio_cache.errors import ConfigError, unknown_name
from radio_cache.statistics.moments import Moments

_TESTED_TOKENS = 8192
_MARGIN = 0.05
"""Held-out tokens are a sample, too: calibration stops at a loss of 95 % of the accepted one."""


def codec_names() -> tuple[str, ...]:
    """Return the names that a request may have: "half", "int8", "klt"."""
    return tuple(dict.fromkeys(label.partition("/")[0] for label in CODECS))


def packings(name: str | None = None) -> tuple[str, ...]:
    """Return the packings of a codec, none for a codec that has no choice of them. name: of the codec; None for all."""
    pairs = [label.partition("/") for label in CODECS]
    return tuple(dict.fromkeys(packing for codec, _, packing in pairs if packing and name in (None, codec)))


@dataclass(frozen=True, kw_only=True)
class CodecRequest:
    """The codec a user requests, and the loss that is acceptable.

    Args:
        name: one of `codec_names()`.
        packing: one of `packings(name)`; ignored by codecs without packings.
        fidelity: mean cosine of decoded and true tokens, on held-out images; for codecs that reach a fidelity.
        step: quantiser step in units of phi, instead of a fidelity.
    """

    name: str = "klt"
    packing: str = "packed"
    fidelity: float = 0.99
    step: float | None = None

    def __post_init__(self) -> None:
        if self.name not in codec_names():
            raise ConfigError(unknown_name("codec", self.name, codec_names()))
        # A codec without packings ignores the field, but a misspelt one is refused all the same.
        known = packings(self.name) or packings()
        if self.packing not in known:
            raise ConfigError(unknown_name("packing", self.packing, known))
        if not 0.5 <= self.fidelity < 1:
            raise ConfigError(
                f"fidelity {self.fidelity:g} is a mean cosine: from 0.5 to below 1, such as 0.99 or 0.999"
            )
        if self.step is not None and not SMALLEST_STEP <= self.step <= LARGEST_STEP:
            raise ConfigError(f"step {self.step:g} is outside {SMALLEST_STEP:g} to {LARGEST_STEP:g}")

    @classmethod
    def of_label(cls, label: str, fidelity: float = 0.99) -> "CodecRequest":
        """Return the request for a codec by its key in `CODECS`, and for a fidelity if the codec reaches one."""
        name, _, packing = label.partition("/")
        return cls(name=name, packing=packing or cls.packing, fidelity=fidelity)

    @property
    def label(self) -> str:
        """The requested codec's key in `CODECS`: "half", "klt/zstd"."""
        return f"{self.name}/{self.packing}" if packings(self.name) else self.name

    @property
    def codec_class(self) -> type[Codec]:
        """The class that is calibrated."""
        return CODECS[self.label]

    @property
    def target(self) -> CalibrationTarget:
        """The loss that calibration accepts: a little less than requested."""
        return CalibrationTarget(fidelity=self.fidelity, cosine=1 - (1 - self.fidelity) * (1 - _MARGIN), step=self.step)

    @property
    def needs_calibration(self) -> bool:
        """True if the codec has parameters that depend on the teacher."""
        return self.codec_class.needs != "nothing"

    def to_json(self) -> dict[str, Any]:
        """Return the settings that decide the stored bytes; those that the codec ignores are left out."""
        # A step takes the place of a fidelity.
        superseded = "fidelity" if self.step is not None else "step"
        settings = {"name", *settings_of(self.name)} - {superseded}
        return {field: value for field, value in asdict(self).items() if field in settings}


def settings_of(name: str) -> tuple[str, ...]:
    """Return the fields of a request that a codec of this name takes: "packing", "fidelity", "step"."""
    reaches_fidelity = any(
        codec_class.reaches_fidelity for label, codec_class in CODECS.items() if label.partition("/")[0] == name
    )
    return (*(("packing",) if packings(name) else ()), *(("fidelity", "step") if reaches_fidelity else ()))


def calibrate(
    request: CodecRequest,
    moments: Moments | None,
    tokens: NDArray[np.float32],
    held_out: NDArray[np.float32],
    *,
    basis: KltBasis | None = None,
    maps: CalibrationMaps | None = None,
) -> Calibrated:
    """Calibrate the requested codec on tokens of some images and measure it on tokens of others.

    Args:
        request: name, packing and acceptable loss.
        moments: of all calibration tokens; None where `basis` is given.
        tokens: (n, c) features of some or all of them; coordinates where `basis` is given.
        held_out: (m, c) the same of other images.
        basis: channel transform that the codec has to take over, of a teacher that is stored already.
        maps: whole maps of some images, for codecs that transform rows and columns.

    Raises:
        CodecError: if the fidelity cannot be reached; the message has the cure.
    """
    # Fidelity is measured dozens of times in a search: a sample of tokens is as exact as the choice of images.
    if basis is None and len(held_out) > _TESTED_TOKENS:
        held_out = held_out[np.random.default_rng(0).permutation(len(held_out))[:_TESTED_TOKENS]]
    sample = CalibrationSample(moments=moments, tokens=tokens, held_out=held_out, basis=basis, maps=maps)
    return request.codec_class.calibrate(request.target, sample)
