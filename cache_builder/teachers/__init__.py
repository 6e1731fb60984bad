"""The teachers: names people use, and how to load one."""

from dataclasses import replace
from pathlib import Path

from cache_builder.teachers import clip, dinov2, efficientnet_lite, sam
from cache_builder.teachers.base import ComputeDtype, Features, Teacher, TeacherOptions, TeacherPreset
from cache_builder.teachers.weights import find_weights
from radio_cache.errors import UnknownTeacherError, unknown_name
from radio_cache.schema import TeacherSpec

__all__ = [
    "ALIASES", "FAMILIES", "TEACHERS", "ComputeDtype", "Features", "Teacher", "TeacherOptions", "TeacherPreset",
    "find_teacher", "find_weights", "load_recorded", "load_teacher",
]  # fmt: skip

TEACHERS: dict[str, TeacherPreset] = {
    preset.name: preset for family in (clip, dinov2, sam, efficientnet_lite) for preset in family.PRESETS
}
ALIASES = {"clip": "dfn-clip-vit-h-14-378", "dinov2": "dinov2-vit-g-14-reg", "sam": "sam-vit-h"}
FAMILIES = {
    "clip": clip.Clip, "dinov2": dinov2.DinoV2, "sam": sam.Sam, "efficientnet-lite": efficientnet_lite.EfficientNetLite
}  # fmt: skip


def find_teacher(name: str) -> TeacherPreset:
    """The preset of that name. An alias keeps the name the user gave, which also names the group in the cache."""
    if name in ALIASES:
        return replace(TEACHERS[ALIASES[name]], name=name)
    if name not in TEACHERS:
        raise UnknownTeacherError(unknown_name("teacher", name, [*ALIASES, *TEACHERS]))
    return TEACHERS[name]


def load_teacher(name: str, options: TeacherOptions | None = None) -> Teacher:
    """A teacher on the CPU, in eval mode. Raises TeacherError with the cure if it cannot be had."""
    options = options or TeacherOptions()
    preset = find_teacher(name)
    return FAMILIES[preset.family](preset, find_weights(preset, options.weights), options)


def load_recorded(spec: TeacherSpec) -> Teacher:
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
        from radio_cache.errors import TeacherWeightsError

        raise TeacherWeightsError(
            f"teacher '{preset.name}': the weights at {spec.weights} are not the ones this cache was built with"
        )
    return teacher
