"""The teachers: names people use, and how to load one. A family's library is imported when its first teacher is loaded."""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from cache_builder.teachers.preset import ComputeDtype, TeacherOptions, TeacherPreset
from cache_builder.teachers.presets import ALIASES, TEACHERS
from cache_builder.teachers.weights import find_weights
from radio_cache.errors import TeacherWeightsError, UnknownTeacherError, unknown_name
from radio_cache.schema import TeacherSpec, level_name

if TYPE_CHECKING:
    from cache_builder.teachers.base import Teacher

__all__ = [
    "ALIASES", "FAMILIES", "TEACHERS", "ComputeDtype", "TeacherOptions", "TeacherPreset", "find_teacher", "find_weights",
    "load_found", "load_recorded", "load_teacher",
]  # fmt: skip

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
}


def find_teacher(name: str) -> TeacherPreset:
    """The preset of that name. An alias keeps the name the user gave, which also names the group in the cache."""
    if name in ALIASES:
        return replace(TEACHERS[ALIASES[name]], name=name)
    if name not in TEACHERS:
        raise UnknownTeacherError(unknown_name("teacher", name, [*ALIASES, *TEACHERS]))
    return TEACHERS[name]


def load_teacher(name: str, options: TeacherOptions | None = None) -> "Teacher":
    """A teacher on the CPU, in eval mode. Raises TeacherError with the cure if it cannot be had."""
    options = options or TeacherOptions()
    return load_found(name, find_weights(find_teacher(name), options.weights), options)


def load_found(name: str, path: Path, options: TeacherOptions) -> "Teacher":
    """A teacher whose weights are at `path`. Raises TeacherError with the cure if they are not its own."""
    preset = find_teacher(name)
    teacher = FAMILIES[preset.family](preset, path, options)
    if options.level_of is not None:
        level = level_name(options.level_of, teacher.spec.geometry.input_hw)
        teacher.spec = replace(teacher.spec, name=level, level_of=options.level_of)
    return teacher


def load_recorded(spec: TeacherSpec) -> "Teacher":
    """The teacher that a cache was built with, from the spec recorded there, with the same geometry and weights.

    Raises TeacherError if the weights are gone or are other ones now.
    """
    recorded = Path(spec.weights)
    options = TeacherOptions(
        weights=recorded if recorded.is_absolute() else None, size_px=spec.geometry.input_hw[0], fit=spec.geometry.fit,
        level_of=spec.level_of,
    )  # fmt: skip
    teacher = load_teacher(spec.level_of or spec.name, options)
    if teacher.spec.weights_sha256 != spec.weights_sha256:
        raise TeacherWeightsError(
            f"teacher '{spec.name}': the weights at {spec.weights} are not the ones this cache was built with"
        )
    return teacher
