"""The teachers: names people use, and how to load one. A family's library is imported when its first teacher is loaded."""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from cache_builder.teachers.libraries import group_name, is_library_name, library_preset
from cache_builder.teachers.preset import ComputeDtype, TeacherOptions, TeacherPreset
from cache_builder.teachers.presets import ALIASES, TEACHERS, TRUNK
from cache_builder.teachers.weights import find_weights, first_line
from radio_cache.allowed_modules import refuse_unless_allowed
from radio_cache.errors import ConfigError, RadioCacheError, TeacherWeightsError, UnknownTeacherError, unknown_name
from radio_cache.format.schema import TeacherSpec, level_name

if TYPE_CHECKING:
    from cache_builder.teachers.base import Teacher

__all__ = [
    "ALIASES",
    "FAMILIES",
    "TEACHERS",
    "ComputeDtype",
    "TeacherOptions",
    "TeacherPreset",
    "cache_group",
    "find_teacher",
    "find_weights",
    "group_name",
    "load_recorded",
    "load_teacher",
    "load_teacher_file",
    "recorded_name",
    "trunk_of",
]

MODULE = "torch-module:"
"""In front of the import path of a teacher that is somebody's own module."""

Family = Callable[[TeacherPreset, Path, TeacherOptions], "Teacher"]


def _family(module: str, name: str) -> Family:
    def load(preset: TeacherPreset, path: Path, options: TeacherOptions) -> "Teacher":
        family: Family = getattr(import_module(f"cache_builder.teachers.{module}"), name)
        return family(preset, path, options)

    return load


FAMILIES: dict[str, Family] = {
    "clip": _family("clip", "Clip"),
    "dinov2": _family("dinov2", "DinoV2"),
    "sam": _family("sam", "Sam"),
    "efficientnet-lite": _family("efficientnet_lite", "EfficientNetLite"),
    "dinov3": _family("timm_model", "TimmModel"),
    "c-radio": _family("timm_model", "TimmModel"),
    "timm": _family("timm_model", "TimmModel"),
    "torch-module": _family("torch_module", "TorchModule"),
}

_SAM2 = (
    "There is no SAM 2: its mask decoder reads three maps of an image encoder with a neck, and timm has that encoder without "
    "the neck. Its trunk alone is a teacher: timm:sam2_hiera_large"
)


def find_teacher(name: str) -> TeacherPreset:
    """The preset of that name: one of ours, or `timm:...`, or `open_clip:...`.

    An alias keeps the name the user gave, which also names the group in the cache.
    Raises UnknownTeacherError with the nearest names.
    """
    if is_library_name(name):
        return library_preset(name)
    if name in ALIASES:
        return replace(TEACHERS[ALIASES[name]], name=name)
    if name not in TEACHERS:
        sam2 = f" {_SAM2}" if name.lower().replace("-", "").startswith("sam2") else ""
        raise UnknownTeacherError(
            unknown_name("teacher", name, [*ALIASES, *TEACHERS], listed_by="radio-cache teachers")
            + f" timm:MODEL and open_clip:MODEL/WEIGHTS are teachers too.{sam2}"
        )
    return TEACHERS[name]


def trunk_of(name: str) -> str:
    """The teacher whose map is that of this one before its neck. Raises ConfigError for one that has no neck."""
    known = ALIASES | TEACHERS
    if f"{name}{TRUNK}" not in known:
        have = [one for one in known if f"{one}{TRUNK}" in known]
        raise ConfigError(f"--features trunk: {name} has no neck that its trunk stands before; {', '.join(have)} have")
    return f"{name}{TRUNK}"


def load_teacher(name: str, options: TeacherOptions | None = None) -> "Teacher":
    """A teacher on the CPU, in eval mode. Raises TeacherError with the cure if it cannot be had."""
    options = options or TeacherOptions()
    return load_teacher_file(name, find_weights(find_teacher(name), options.weights), options)


def load_teacher_file(name: str, path: Path, options: TeacherOptions) -> "Teacher":
    """A teacher whose weights are at `path`. Raises TeacherError with the cure if they are not its own."""
    preset = find_teacher(name)
    try:
        teacher = FAMILIES[preset.family](preset, path, options)
    except RadioCacheError:
        raise
    except Exception as exc:  # libraries fail in ways of their own
        from cache_builder.teachers.state_dict import is_out_of_memory, out_of_memory_error

        if is_out_of_memory(exc):
            raise out_of_memory_error(name, path) from exc
        raise TeacherWeightsError(
            f"teacher '{name}': {preset.model} cannot be built with {path}: {type(exc).__name__}: {first_line(exc)}. The file, "
            "or the configuration beside it, is not that of such a network"
        ) from exc
    if options.legacy_loading:
        teacher.spec = replace(teacher.spec, loaded={})
    if options.compiled:
        from cache_builder.teachers.compiled import Compiled

        teacher = Compiled(teacher)
    teacher.spec = replace(teacher.spec, views=options.views, view_sampling=options.view_sampling)
    if options.level_of is not None:
        teacher.spec = replace(teacher.spec, name=cache_group(name, options), level_of=preset.name)
    return teacher


def cache_group(name: str, options: TeacherOptions) -> str:
    """The group of the cache that a teacher asked for by this name is kept in: its own name, or of a library's model."""
    preset = find_teacher(options.level_of or name)
    if options.level_of is None or options.size_px is None:
        return preset.name
    return level_name(preset.name, (options.size_px, options.size_px))


def recorded_name(spec: TeacherSpec) -> str:
    """What to ask for to get the teacher that a cache was built with: the name of its group, or a library's name."""
    group = spec.level_of or spec.name
    return spec.model if is_library_name(spec.model) and group_name(spec.model) == group else group


def load_recorded(spec: TeacherSpec, weights: Path | None = None, *, size_px: int | None = None) -> "Teacher":
    """Load the teacher that a cache was built with, from the spec recorded there, with the same geometry and weights.

    Args:
        weights: where they are now, if not where the build found them.
        size_px: another input size than the recorded one.

    Raises:
        TeacherError: the weights are gone, or other ones now.
        ConfigError: the spec names a module of somebody's own that the caller did not allow.
    """
    name = recorded_name(spec)
    if name.startswith(MODULE):
        refuse_unless_allowed(name.removeprefix(MODULE), what=f"teacher '{name}' of the cache")
    recorded = weights or Path(spec.weights)
    if weights is None and recorded.is_absolute() and not recorded.is_file():
        raise TeacherWeightsError(
            f"teacher '{spec.name}': the weights that the cache was built with are not at {recorded} any more (SHA-256 "
            f"{spec.weights_sha256[:12]}...): bring them back, or say where they are now with --weights"
        )
    options = TeacherOptions(
        weights=recorded if weights or recorded.is_absolute() else None,
        size_px=size_px or spec.geometry.input_hw[0],
        fit=spec.geometry.fit,
        dtype=cast(ComputeDtype, spec.compute_dtype),
        level_of=name if spec.level_of and size_px is None else None,
        views=spec.views,
        view_sampling=spec.view_sampling,
        legacy_loading=not spec.loaded and size_px is None,
    )
    teacher = load_teacher(name, options)
    if teacher.spec.weights_sha256 != spec.weights_sha256:
        raise TeacherWeightsError(
            f"teacher '{spec.name}': the weights at {recorded} are not the ones this cache was built with"
        )
    return teacher
