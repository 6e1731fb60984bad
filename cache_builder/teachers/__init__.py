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
from radio_cache.schema import TeacherSpec

if TYPE_CHECKING:
    from cache_builder.teachers.base import Teacher

__all__ = [
    "ALIASES", "FAMILIES", "TEACHERS", "ComputeDtype", "TeacherOptions", "TeacherPreset", "find_teacher", "find_weights",
    "load_recorded", "load_teacher",
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
    preset = find_teacher(name)
    return FAMILIES[preset.family](preset, find_weights(preset, options.weights), options)


def load_recorded(spec: TeacherSpec) -> "Teacher":
    """The teacher that a cache was built with, from the spec recorded there, with the same geometry and weights.

    Raises TeacherError if the weights are gone or are other ones now.
    """
    preset = find_teacher(spec.name)
    recorded = Path(spec.weights)
    options = TeacherOptions(
        weights=recorded if recorded.is_absolute() else None, size_px=spec.geometry.input_hw[0], fit=spec.geometry.fit
    )
    teacher = load_teacher(spec.name, options)
    if teacher.spec.weights_sha256 != spec.weights_sha256:
        raise TeacherWeightsError(
            f"teacher '{preset.name}': the weights at {spec.weights} are not the ones this cache was built with"
        )
    return teacher
