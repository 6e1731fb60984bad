"""Teachers by name, and the functions that load them.

The library of a family is imported when its first teacher is loaded.
"""

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
"""Prefix of the import path of a teacher that is a user's own module."""

Family = Callable[[TeacherPreset, Path, TeacherOptions], "Teacher"]
"""Constructor of a family's class: preset, weights file, options."""


def _family(module: str, name: str) -> Family:
    """Return a constructor that imports its class when it is called first."""

    def load(preset: TeacherPreset, path: Path, options: TeacherOptions) -> "Teacher":
        # open_clip, timm and segment_anything take seconds to import: only the family that is used pays.
        family: Family = getattr(import_module(f"cache_builder.teachers.{module}"), name)
        return family(preset, path, options)

    return load


# Family of a preset -> module and class. timm's models of all authors share one class.
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
    """Return the preset of a name, an alias, `timm:MODEL`, `open_clip:MODEL/WEIGHTS` or `torch-module:PATH`.

    The preset of an alias has the alias for its name, which is also the name of its group in the cache.

    Raises:
        UnknownTeacherError: no teacher has this name. The message lists the nearest names.
        ConfigError: the preprocessing of a library's model is not supported.
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
    """Return the name of the teacher whose map is that of this one before its neck.

    Raises:
        ConfigError: this teacher has no neck.
    """
    known = ALIASES | TEACHERS
    if f"{name}{TRUNK}" not in known:
        with_neck = [teacher for teacher in known if f"{teacher}{TRUNK}" in known]
        raise ConfigError(f"--features trunk: {name} has no neck; teachers with one: {', '.join(with_neck)}")
    return f"{name}{TRUNK}"


def load_teacher(name: str, options: TeacherOptions | None = None) -> "Teacher":
    """Load a teacher on the CPU, in eval mode.

    Raises:
        TeacherError: no teacher has this name, or its weights are missing or wrong.
    """
    options = options or TeacherOptions()
    return load_teacher_file(name, find_weights(find_teacher(name), options.weights), options)


def load_teacher_file(name: str, path: Path, options: TeacherOptions) -> "Teacher":
    """Load a teacher whose weights are at `path`, on the CPU, in eval mode.

    Args:
        name: name of the teacher.
        path: its weights file, from `find_weights`.
        options: options of the user.

    Raises:
        TeacherError: the file does not hold the teacher's weights.
    """
    preset = find_teacher(name)
    try:
        teacher = FAMILIES[preset.family](preset, path, options)
    except RadioCacheError:
        raise
    except Exception as exc:  # libraries raise any kind of error for a wrong file
        # Here, because state_dict imports torch, and the commands that only list teachers do not.
        from cache_builder.teachers.state_dict import is_out_of_memory, out_of_memory_error

        if is_out_of_memory(exc):
            raise out_of_memory_error(name, path) from exc
        raise TeacherWeightsError(
            f"teacher '{name}': {preset.model} cannot be built with {path}: {type(exc).__name__}: {first_line(exc)}. The file, "
            "or the configuration beside it, is not that of such a network"
        ) from exc
    # A cache of that time has no record of what was loaded; its spec must stay equal.
    if options.legacy_loading:
        teacher.spec = replace(teacher.spec, loaded={})
    if options.compiled:
        from cache_builder.teachers.compiled import Compiled

        teacher = Compiled(teacher)
    teacher.spec = replace(teacher.spec, views=options.views, view_sampling=options.view_sampling)
    # A further input size is a group of its own, which names the teacher it belongs to.
    if options.level_of is not None:
        teacher.spec = replace(teacher.spec, name=cache_group(name, options), level_of=preset.name)
    return teacher


def cache_group(name: str, options: TeacherOptions) -> str:
    """Return the group of the cache for a teacher: its name, made from the model's for a library's teacher."""
    preset = find_teacher(options.level_of or name)
    if options.level_of is None or options.size_px is None:
        return preset.name
    return level_name(preset.name, (options.size_px, options.size_px))


def recorded_name(spec: TeacherSpec) -> str:
    """Return the name that `find_teacher` knows the teacher of a cache by: its group, or a library's name."""
    group = spec.level_of or spec.name
    # The group of a library's model is a shortened name; the spec has the whole one.
    return spec.model if is_library_name(spec.model) and group_name(spec.model) == group else group


def load_recorded(spec: TeacherSpec, weights: Path | None = None, *, size_px: int | None = None) -> "Teacher":
    """Load the teacher that a cache was built with, from the spec recorded there, with the same geometry and weights.

    Args:
        spec: the spec recorded in the cache.
        weights: the current weights file, if it is not at the recorded path.
        size_px: input size in pixels instead of the recorded one.

    Raises:
        TeacherError: the weights are missing, or differ from the recorded ones.
        ConfigError: the spec names a user's own module that the caller did not allow.
    """
    name = recorded_name(spec)
    # A cache may come from anyone: importing the module that it names would run their code.
    if name.startswith(MODULE):
        refuse_unless_allowed(name.removeprefix(MODULE), what=f"teacher '{name}' of the cache")
    recorded = weights or Path(spec.weights)
    if weights is None and recorded.is_absolute() and not recorded.is_file():
        raise TeacherWeightsError(
            f"teacher '{spec.name}': the weights that the cache was built with are not at {recorded} any more (SHA-256 "
            f"{spec.weights_sha256[:12]}...): bring them back, or pass their current path with --weights"
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
    # Other weights give other features under the same name.
    if teacher.spec.weights_sha256 != spec.weights_sha256:
        raise TeacherWeightsError(
            f"teacher '{spec.name}': the weights at {recorded} are not the ones this cache was built with"
        )
    return teacher
