"""The preprocessing of timm and open_clip as view geometry. A setting without an exact equivalent is refused."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from radio_cache.errors import ConfigError
from radio_cache.format.schema import Normalisation
from radio_cache.geometry.crops import Fit, Interpolation, ViewGeometry

# Names of the libraries -> ours. timm's "border" and open_clip's "longest" pad with a colour, which no `Fit` does.
_TIMM_FITS: dict[str, Fit] = {"center": "crop", "squash": "squash"}
_MAX_SIDE_PX = 1 << 14
_OPEN_CLIP_FITS: dict[str, Fit] = {"shortest": "crop", "squash": "squash"}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The steps from an image to a square input."""

    fit: Fit

    size_px: int
    """Side of the input."""

    resize_px: int
    """Shorter side before the centre crop; for `squash` the side of the input."""

    interpolation: Interpolation
    normalisation: Normalisation

    def geometry(self, tokens: int, stride_px: float, offset_px: float) -> ViewGeometry:
        """Return the geometry of a network's views.

        Args:
            tokens: tokens along each side of the map.
            stride_px: distance of two tokens, in pixels of the input.
            offset_px: centre of the first token.
        """
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
    subject: str, config: Mapping[str, Any], *, size_px: int | None = None, fit: Fit | None = None
) -> Preprocessing:
    """Return the preprocessing of `timm.data.create_transform` in evaluation.

    Args:
        subject: the model in words, for messages.
        config: the dictionary of `timm.data.resolve_data_config`.
        size_px: side of the input instead of the model's own.
        fit: the fit instead of the model's own.

    Raises:
        ConfigError: the input is not square, or a step has no exact equivalent in this package.
    """
    native_px = _square(subject, list(config["input_size"])[1:])  # (c, h, w)
    chosen_fit = fit or _known_fit(subject, str(config["crop_mode"]), _TIMM_FITS)
    size, share = size_px or native_px, float(config["crop_pct"])
    # timm squashes to a larger square and crops its centre; a user who sets the fit squashes to the input itself.
    if share > 1 or (share != 1 and chosen_fit == "squash" and fit is None):
        raise ConfigError(
            f"{subject} fits its images by '{config['crop_mode']}' with crop_pct {share}, which is not supported"
        )
    return Preprocessing(
        fit=chosen_fit,
        size_px=size,
        # timm rounds down.
        resize_px=math.floor(size / share) if chosen_fit == "crop" else size,
        interpolation=_known_interpolation(subject, config["interpolation"]),
        normalisation=_pixels(subject, config),
    )


def open_clip_preprocessing(
    subject: str, config: Mapping[str, Any], *, size_px: int | None = None, fit: Fit | None = None
) -> Preprocessing:
    """Return the preprocessing of `open_clip.image_transform_v2` in evaluation.

    Args:
        subject: the model in words, for messages.
        config: the fields of open_clip's `PreprocessCfg`.
        size_px: side of the input instead of the model's own.
        fit: the fit instead of the model's own.

    Raises:
        ConfigError: as `timm_preprocessing`.
    """
    native_size = config["size"]
    size = size_px or _square(subject, [native_size, native_size] if isinstance(native_size, int) else native_size)
    return Preprocessing(
        fit=fit or _known_fit(subject, str(config["resize_mode"]), _OPEN_CLIP_FITS),
        size_px=size,
        resize_px=size,  # open_clip resizes to the size of the crop: no margin is lost
        interpolation=_known_interpolation(subject, config["interpolation"]),
        normalisation=_pixels(subject, config),
    )


def _square(subject: str, input_hw: Any) -> int:
    """Return the side of a square input in pixels, from a value of a configuration file.

    Raises:
        ConfigError: the value is no height and width, or the input is not square.
    """
    match input_hw:
        case [int() as h, int() as w] if 1 <= h <= _MAX_SIDE_PX and 1 <= w <= _MAX_SIDE_PX:
            pass
        case _:
            raise ConfigError(
                f"{subject} has the input size {input_hw!r:.80}; needed is a height and a width in pixels"
            )
    # `--size` is one number, and every family builds square grids from it.
    if h != w:
        raise ConfigError(f"{subject} takes input of {h} x {w} pixels; teachers take square input")
    return int(h)


def _known_fit(subject: str, fit: str, known: Mapping[str, Fit]) -> Fit:
    """Return our name for a library's fit.

    Raises:
        ConfigError: the fit has no equivalent.
    """
    if fit not in known:
        raise ConfigError(f"{subject} fits its images by '{fit}', which is not supported; known are {', '.join(known)}")
    return known[fit]


def _known_interpolation(subject: str, interpolation: Any) -> Interpolation:
    """Return the interpolation.

    Raises:
        ConfigError: it has no equivalent.
    """
    if interpolation not in get_args(Interpolation):
        raise ConfigError(
            f"{subject} resizes its images by '{interpolation}', which is not supported; known are "
            f"{', '.join(get_args(Interpolation))}"
        )
    return cast(Interpolation, interpolation)


def _pixels(subject: str, config: Mapping[str, Any]) -> Normalisation:
    """Return the normalisation of pixels from 0 to 255.

    Raises:
        ConfigError: mean or std are not three finite numbers, or a std is not positive.
    """

    # A single number stands for all channels.
    def of_channels(value: Any) -> tuple[float, float, float]:
        return cast(Any, tuple(value) if isinstance(value, list | tuple) else (value,) * 3)

    mean, std = of_channels(config["mean"]), of_channels(config["std"])
    triples: dict[str, Sequence[Any]] = {"mean": mean, "std": std}
    for name, values in triples.items():
        if len(values) != 3 or not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            raise ConfigError(f"{subject} has the pixel {name} {values!r:.80}; needed are three numbers")
    if min(std) <= 0:
        raise ConfigError(f"{subject} has the pixel std {std}; needed are three numbers above 0")
    return Normalisation(scale=255.0, mean=mean, std=std)
