"""Students: the networks that learn from the cached features.

`create_student("e-radio-b")` builds one by name; `create_student("timm:convnext_base")` takes any backbone of timm.
"""

from dataclasses import fields, replace
from typing import Any

from radio_cache.errors import ConfigError, unknown_name
from trainer.students import eradio, vit
from trainer.students.base import FeatureFormat, Student, StudentInputError, StudentOutput, UnsupportedResolutionError
from trainer.students.eradio import ERadio, ERadioConfig
from trainer.students.timm_backbone import TimmBackbone
from trainer.students.timm_weights import initialise_from_timm
from trainer.students.vit import ViT, ViTConfig

__all__ = [
    "STUDENTS",
    "ERadio",
    "ERadioConfig",
    "FeatureFormat",
    "Student",
    "StudentInputError",
    "StudentOutput",
    "TimmBackbone",
    "UnsupportedResolutionError",
    "ViT",
    "ViTConfig",
    "create_student",
    "initialise_from_timm",
]

STUDENTS: dict[str, ERadioConfig | ViTConfig] = {**eradio.VERSIONS, **vit.VERSIONS}


def create_student(name: str, **overrides: Any) -> Student:
    """A student with fresh weights, in training mode.

    name: one of `STUDENTS`, or "timm:" and any model of timm.
    overrides: fields of that student's config (`ERadioConfig`, `ViTConfig`); for timm, `out_index`, `pretrained` and
        whatever `timm.create_model` takes.
    Raises: ConfigError for a name or a setting nobody knows, the nearest first, or for an impossible value.
    """
    if name.startswith("timm:"):
        return TimmBackbone(name.removeprefix("timm:"), **overrides)
    if name not in STUDENTS:
        raise ConfigError(unknown_name("student", name, [*STUDENTS, "timm:<any model of timm>"]))
    config = STUDENTS[name]
    settings = {field.name for field in fields(config)} - {"name"}
    for setting in overrides:
        if setting not in settings:
            raise ConfigError(unknown_name(f"setting of student '{name}'", setting, settings))
    match config:
        case ERadioConfig():
            return ERadio(replace(config, **overrides))
        case ViTConfig():
            student = ViT(replace(config, **overrides))
            if student.config.init_from is not None:
                initialise_from_timm(student, student.config.init_from, student.config.init_file)
            return student
