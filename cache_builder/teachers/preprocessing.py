"""How timm and open_clip prepare an image, in our words: what has no word here is refused, never approximated."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from radio_cache.errors import ConfigError
from radio_cache.format.schema import Normalisation
from radio_cache.geometry.crops import Fit, Interpolation, ViewGeometry

_TIMM_FITS: dict[str, Fit] = {"center": "crop", "squash": "squash"}
_MAX_SIDE_PX = 1 << 14
_OPEN_CLIP_FITS: dict[str, Fit] = {"shortest": "crop", "squash": "squash"}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From an image to square input. resize_px: the shorter side before the centre crop; for `squash` the input's side."""

    fit: Fit
    size_px: int
    resize_px: int
    interpolation: Interpolation
    normalisation: Normalisation

    def geometry(self, tokens: int, stride_px: float, offset_px: float) -> ViewGeometry:
        """Of a network whose first token is centred at offset_px, and every other one stride_px further."""
        return ViewGeometry(
            fit=self.fit,
            input_hw=(self.size_px, self.size_px),
            resize_px=self.resize_px,
            interpolation=self.interpolation,
            grid_hw=(tokens, tokens),
            stride_px=stride_px,
            offset_px=offset_px,
        )


def timm_preprocessing(
    what: str, config: Mapping[str, Any], *, size_px: int | None = None, fit: Fit | None = None
) -> Preprocessing:
    """What `timm.data.create_transform` does in evaluation. config: `timm.data.resolve_data_config`'s.

    size_px, fit: instead of the model's own. what: the model in words, for messages.
    Raises ConfigError for input that is not square, and for what this package cannot do exactly.
    """
    own = _square(what, list(config["input_size"])[1:])
    chosen = fit or _known_fit(what, str(config["crop_mode"]), _TIMM_FITS)
    size, share = size_px or own, float(config["crop_pct"])
    if share > 1 or (share != 1 and chosen == "squash" and fit is None):
        raise ConfigError(
            f"{what} wants its images fitted by '{config['crop_mode']}' with crop_pct {share}, which is not done here"
        )
    return Preprocessing(
        fit=chosen,
        size_px=size,
        resize_px=math.floor(size / share) if chosen == "crop" else size,
        interpolation=_known_interpolation(what, config["interpolation"]),
        normalisation=_pixels(what, config),
    )


def open_clip_preprocessing(
    what: str, config: Mapping[str, Any], *, size_px: int | None = None, fit: Fit | None = None
) -> Preprocessing:
    """What `open_clip.image_transform_v2` does in evaluation. config: the fields of its `PreprocessCfg`.

    Arguments and errors as in `timm_preprocessing`.
    """
    own = config["size"]
    size = size_px or _square(what, [own, own] if isinstance(own, int) else own)
    return Preprocessing(
        fit=fit or _known_fit(what, str(config["resize_mode"]), _OPEN_CLIP_FITS),
        size_px=size,
        resize_px=size,
        interpolation=_known_interpolation(what, config["interpolation"]),
        normalisation=_pixels(what, config),
    )


def _square(what: str, input_hw: Any) -> int:
    match input_hw:
        case [int() as h, int() as w] if 1 <= h <= _MAX_SIDE_PX and 1 <= w <= _MAX_SIDE_PX:
            pass
        case _:
            raise ConfigError(
                f"{what} says that its input is {input_hw!r:.80}; needed is a height and a width in pixels"
            )
    if h != w:
        raise ConfigError(f"{what} takes input of {h} x {w} pixels; teachers take square input")
    return int(h)


def _known_fit(what: str, asked: str, known: Mapping[str, Fit]) -> Fit:
    if asked not in known:
        raise ConfigError(
            f"{what} wants its images fitted by '{asked}', which is not known here; known are {', '.join(known)}"
        )
    return known[asked]


def _known_interpolation(what: str, asked: Any) -> Interpolation:
    if asked not in get_args(Interpolation):
        raise ConfigError(
            f"{what} wants its images resized '{asked}', which is not known here; known are "
            f"{', '.join(get_args(Interpolation))}"
        )
    return cast(Interpolation, asked)


def _pixels(what: str, config: Mapping[str, Any]) -> Normalisation:
    def of_channels(value: Any) -> tuple[float, float, float]:
        return cast(Any, tuple(value) if isinstance(value, list | tuple) else (value,) * 3)

    mean, std = of_channels(config["mean"]), of_channels(config["std"])
    read: dict[str, Sequence[Any]] = {"mean": mean, "std": std}
    for name, values in read.items():
        if len(values) != 3 or not all(isinstance(one, int | float) and math.isfinite(one) for one in values):
            raise ConfigError(f"{what} says that the {name} of its pixels is {values!r:.80}; needed are three numbers")
    if min(std) <= 0:
        raise ConfigError(f"{what} says that the std of its pixels is {std}; needed are three numbers above 0")
    return Normalisation(scale=255.0, mean=mean, std=std)
