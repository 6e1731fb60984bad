"""Options of `radio-cache build` as a configuration. Many are `NAME=VALUE`: a value for all teachers, or for one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, Unpack, cast, get_args

from cache_builder.build_config import BuildConfig
from cache_builder.teachers import ComputeDtype, TeacherOptions, find_teacher, trunk_of
from radio_cache.codecs.calibrate import CodecRequest, codec_names, settings_of
from radio_cache.errors import ConfigError
from radio_cache.format.codec_record import CodecRecord
from radio_cache.format.pixels import PixelFormat, PixelStore
from radio_cache.format.schema import MAX_VIEWS, level_name
from radio_cache.geometry.crops import Fit
from radio_cache.geometry.views import ViewSampling
from radio_cache.reader import Cache, is_cache, max_pixels_of_any_cache
from radio_cache.terminal.options import split_name_value

Value = TypeVar("Value")

FITS: tuple[Fit, ...] = get_args(Fit)
FEATURES = ("neck", "trunk")
"""Maps of a teacher that has both: behind its neck, or before it."""

JPEG_QUALITY = 90
"""Quality of stored images, colours at full resolution. docs/build.md compares other settings."""


class TeacherFlags(TypedDict):
    """Options of `radio-cache build` about teachers, as click passes them."""

    weights: tuple[str, ...]
    size: tuple[str, ...]
    fit: tuple[str, ...]
    features: tuple[str, ...]
    dtype: str
    codec: tuple[str, ...]
    packing: tuple[str, ...]
    fidelity: tuple[str, ...]
    step: tuple[str, ...]
    views: tuple[str, ...]
    flip_views: bool
    compiled: bool


def build_config(
    *,
    teachers: tuple[str, ...],
    out: str | Path,
    device: str = "cpu",
    batch_size: str | None,
    shard_images: int | None,
    max_pixels: int | None,
    store_pixels: int | None,
    pixel_format: PixelFormat,
    **options: Any,
) -> BuildConfig:
    """Return the configuration of a build, from the options of `radio-cache build` as click passes them.

    Args:
        teachers: names of teachers.
        out: the cache.
        device: device of the teachers, which decides what --dtype auto means; see `on_device`.
        batch_size: a number, "auto", or None.
        shard_images: None for the number of an existing cache, or the default.
        max_pixels: None for the limit of an existing cache, or the default.
        store_pixels: shorter side of stored images, or None.
        pixel_format: format of stored images.
        options: those of `TeacherFlags`; all others are fields of BuildConfig, where None stands for the default.

    Raises:
        ConfigError: a value is not possible; the message names the option.
    """
    # What is left in `options` afterwards are fields of the configuration.
    flags = cast(TeacherFlags, {name: options.pop(name) for name in TeacherFlags.__annotations__})
    existing = Cache(out).meta if None in (shard_images, max_pixels) and is_cache(out) else None
    if existing is not None:
        shard_images = existing.shard_images if shard_images is None else shard_images
        max_pixels = _trusted_max_pixels(existing.max_pixels, out) if max_pixels is None else max_pixels
    # None stands for the default, which is written in the dataclass alone.
    settings: dict[str, Any] = options | {"shard_images": shard_images, "max_pixels": max_pixels}
    return BuildConfig(
        out=out,
        device=device,
        teachers=teacher_options(teachers, device, **flags),
        batch_size=parse_batch_size(batch_size),
        pixels=pixel_store(store_pixels, pixel_format),
        **{name: value for name, value in settings.items() if value is not None},
    )


def on_device(config: BuildConfig, device: str, *, threads: int, dtype: str) -> BuildConfig:
    """Return the configuration for a device that is known only after workers have answered.

    Args:
        config: a configuration from `build_config`.
        device: device of the teachers.
        threads: threads of one process.
        dtype: value of --dtype, which may be "auto".
    """
    compute_dtype = resolve_dtype(dtype, device)
    teachers = {name: replace(options, dtype=compute_dtype) for name, options in config.teachers.items()}
    return replace(config, device=device, threads=threads, teachers=teachers)


def _trusted_max_pixels(max_pixels: int, out: str | Path) -> int:
    # A cache from elsewhere may state a limit that lets one image fill the memory.
    usual = max_pixels_of_any_cache()
    if max_pixels > usual:
        raise ConfigError(
            f"{out} states that an image may have {max_pixels} pixels, and {usual} are usual: add --max-pixels {max_pixels} "
            "if you trust it"
        )
    return max_pixels


def resolve_dtype(dtype: str, device: str) -> ComputeDtype:
    """Return the precision of forward passes; "auto" is bfloat16 on a GPU and float32 on a CPU."""
    automatic = "float32" if device == "cpu" else "bfloat16"
    return cast(ComputeDtype, automatic if dtype == "auto" else dtype)


def parse_batch_size(text: str | None) -> int | Literal["auto"] | None:
    """Return the value of --batch-size. Raise ConfigError if it is neither a number of images nor "auto"."""
    if text is None or text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--batch-size {text}: a whole number of images, or auto")
    return int(text)


def pixel_store(side_px: int | None, pixel_format: PixelFormat) -> PixelStore | None:
    """Return how the cache stores images, or None if it stores none."""
    # A lossless format has no quality; 0 keeps the record of the cache free of a number without meaning.
    quality = JPEG_QUALITY if pixel_format == "jpeg" else 0
    return None if side_px is None else PixelStore(side_px=side_px, format=pixel_format, quality=quality)


def teacher_options(teachers: Sequence[str], device: str, **flags: Unpack[TeacherFlags]) -> dict[str, TeacherOptions]:
    """Return group in the cache -> options: a teacher's name for its first size, then its levels.

    Args:
        teachers: names of teachers.
        device: device of the teachers, which decides what --dtype auto means.
        flags: values of the options about teachers.

    Raises:
        UnknownTeacherError: a name is unknown.
        ConfigError: a value is not possible; the message names the option.
    """
    # First, so that a misspelt teacher is the error that the user sees.
    for name in teachers:
        find_teacher(name)
    features = per_teacher("--features", flags["features"], teachers, one_of("--features", FEATURES), shared=True)
    # A trunk is a teacher of its own, with its own group in the cache.
    names = [trunk_of(name) if features.get(name) == "trunk" else name for name in teachers]
    if len(set(names)) < len(names):
        raise ConfigError(f"--teacher {next(name for name in names if names.count(name) > 1)} is given twice")
    files = per_teacher("--weights", flags["weights"], teachers, lambda text: Path(text).expanduser(), shared=False)
    sizes = several_per_teacher("--size", flags["size"], teachers, pixels)
    fits: dict[str, Fit] = per_teacher("--fit", flags["fit"], teachers, one_of("--fit", FITS), shared=True)
    codecs = codec_requests(
        teachers, codec=flags["codec"], packing=flags["packing"], fidelity=flags["fidelity"], step=flags["step"]
    )
    extra_views = per_teacher("--views", flags["views"], teachers, view_count, shared=True)
    dtype = resolve_dtype(flags["dtype"], device)
    options: dict[str, TeacherOptions] = {}
    for preset, name in zip(teachers, names, strict=True):
        sizes_px = sizes.get(preset, [])
        options[name] = TeacherOptions(
            weights=files.get(preset),
            size_px=sizes_px[0] if sizes_px else None,
            fit=fits.get(preset),
            dtype=dtype,
            codec=CodecRecord.of_request(codecs[preset]),
            # The whole image is the first view.
            views=1 + extra_views.get(preset, 0),
            view_sampling=view_sampling(flipped=flags["flip_views"]) if extra_views.get(preset) else None,
            compiled=flags["compiled"],
        )
        # Further sizes are levels: the same teacher, stored beside its first size.
        for px in sizes_px[1:]:
            options[level_name(name, (px, px))] = replace(options[name], size_px=px, level_of=name)
    return options


def per_teacher(
    flag: str, texts: Sequence[str], teachers: Sequence[str], parse: Callable[[str], Value], *, shared: bool
) -> dict[str, Value]:
    """Return teacher name -> value of an option that takes one value per teacher.

    Args:
        flag: name of the option, for messages.
        texts: values as typed: `VALUE` for every teacher, or `NAME=VALUE`.
        teachers: names of the teachers.
        parse: makes the value of its text.
        shared: whether a bare value may be of several teachers; one weights file cannot.

    Raises:
        ConfigError: a name is not among `teachers`, a bare value needs a name, or a teacher has two values.
    """
    values_by_teacher = several_per_teacher(flag, texts, teachers, parse, shared=shared)
    for name, values in values_by_teacher.items():
        if len(values) > 1:
            raise ConfigError(f"{flag} is given {len(values)} times for {name}: one value is possible")
    return {name: values[0] for name, values in values_by_teacher.items()}


def several_per_teacher(
    flag: str, texts: Sequence[str], teachers: Sequence[str], parse: Callable[[str], Value], *, shared: bool = True
) -> dict[str, list[Value]]:
    """Return teacher name -> values in the order of the command line. Values with a name replace those without.

    Raises:
        ConfigError: as `per_teacher`, and for the same value twice.
    """
    bare: list[Value] = []
    named: dict[str, list[Value]] = {}
    for text in texts:
        name, value = split_name_value(text)
        if name is not None and name in teachers:
            values, parsed = named.setdefault(name, []), parse(value)
        # A file name may hold an equals sign, too.
        elif name is not None and not Path(text).exists():
            raise ConfigError(
                f"{flag} {text}: '{name}' is not among the teachers of this build ({', '.join(teachers)})"
            )
        elif not shared and len(teachers) > 1:
            raise ConfigError(f"{flag} {text}: with several teachers, name one: {flag} {teachers[0]}={text}")
        else:
            values, parsed = bare, parse(text)
        if parsed in values:
            raise ConfigError(f"{flag} {text}: {name if values is not bare else ', '.join(teachers)} has that already")
        values.append(parsed)
    # Named values replace bare ones, in whichever order they were typed.
    return (dict.fromkeys(teachers, bare) if bare else {}) | named


def pixels(text: str) -> int:
    """Return a size in pixels. Raise ConfigError if the text is no whole number."""
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--size {text}: a size is a whole number of pixels")
    return int(text)


def view_count(text: str) -> int:
    """Return a number of extra views. Raise ConfigError if the text is none."""
    if not text.isdecimal() or int(text) >= MAX_VIEWS:
        raise ConfigError(f"--views {text}: how many extra views of each image, 0 to {MAX_VIEWS - 1}")
    return int(text)


def view_sampling(*, flipped: bool) -> ViewSampling:
    """Return how extra views are drawn: a quarter of the image or more, in about its proportions, half mirrored if `flipped`."""
    # The area and the aspect ratios of random-resized crops, but for small crops, whose maps a cached one cannot give.
    # Random-resized crops without the small ones: a teacher sees too little of an image in them.
    return ViewSampling(seed=0, area=(0.25, 1.0), ratio=(3 / 4, 4 / 3), flip_share=0.5 if flipped else 0.0)


def one_of(flag: str, choices: tuple[Value, ...]) -> Callable[[str], Value]:
    """Return a function that reads one of `choices`, and raises ConfigError for any other text."""

    def read(text: str) -> Value:
        for choice in choices:
            if text == choice:
                return choice
        raise ConfigError(f"{flag} {text}: one of {', '.join(map(str, choices))}")

    return read


def codec_requests(
    teachers: Sequence[str],
    *,
    codec: Sequence[str],
    packing: Sequence[str],
    fidelity: Sequence[str],
    step: Sequence[str],
) -> dict[str, CodecRequest | None]:
    """Return teacher name -> codec request, or None for a teacher without options.

    Raises:
        ConfigError: a setting does not belong to the codec, or there are both a fidelity and a step.
    """
    codecs = per_teacher("--codec", codec, teachers, str, shared=True)
    settings: dict[str, dict[str, Any]] = {
        "packing": per_teacher("--packing", packing, teachers, str, shared=True),
        "fidelity": per_teacher("--fidelity", fidelity, teachers, lambda text: number("--fidelity", text), shared=True),
        "step": per_teacher("--step", step, teachers, lambda text: number("--step", text), shared=True),
    }
    requests: dict[str, CodecRequest | None] = {}
    for teacher in teachers:
        teacher_settings = {name: values[teacher] for name, values in settings.items() if teacher in values}
        name = codecs.get(teacher, CodecRequest().name)
        # Refused rather than ignored: the user expects an effect.
        foreign = [option for option in teacher_settings if option not in settings_of(name)]
        if foreign:
            users = " and ".join(codec for codec in codec_names() if foreign[0] in settings_of(codec))
            raise ConfigError(f"--{foreign[0]} is a setting of {users}, and {teacher} is to be stored as {name}")
        if "fidelity" in teacher_settings and "step" in teacher_settings:
            raise ConfigError(f"{teacher} has both --fidelity and --step: one follows from the other, give one")
        # None and the default request differ: with None, too few images to calibrate on lead to half.
        is_requested = teacher in codecs or teacher_settings
        requests[teacher] = CodecRequest(name=name, **teacher_settings) if is_requested else None
    return requests


def number(flag: str, text: str) -> float:
    """Return a number. Raise ConfigError if the text is none."""
    try:
        return float(text)
    except ValueError as exc:
        raise ConfigError(f"{flag} {text}: that is not a number") from exc
