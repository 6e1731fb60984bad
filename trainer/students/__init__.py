"""Students: the networks that learn from the cached features.

`create_student("e-radio-b")` builds one by name; `create_student("timm:convnext_base")` takes any backbone of timm,
`create_student("torch-module:my_package.my_file:MyNet")` a network of your own.
"""

from dataclasses import fields, replace
from typing import Any

from timm.models import is_model

from radio_cache.errors import ConfigError, unknown_name
from trainer.students.base import FeatureFormat, Student, StudentInputError, StudentOutput, UnsupportedResolutionError
from trainer.students.eradio import VERSIONS as E_RADIOS
from trainer.students.eradio import ERadio, ERadioConfig
from trainer.students.timm_backbone import VERSIONS as TIMM_BACKBONES
from trainer.students.timm_backbone import TimmBackbone, TimmConfig
from trainer.students.timm_weights import initialise_from_timm
from trainer.students.torch_module import TorchModule
from trainer.students.vit import VERSIONS as VITS
from trainer.students.vit import ViT, ViTConfig

__all__ = [
    "E_RADIOS",
    "STUDENTS",
    "TIMM_BACKBONES",
    "VITS",
    "ERadio",
    "ERadioConfig",
    "FeatureFormat",
    "Student",
    "StudentInputError",
    "StudentOutput",
    "TimmBackbone",
    "TimmConfig",
    "TorchModule",
    "UnsupportedResolutionError",
    "ViT",
    "ViTConfig",
    "create_student",
    "initialise_from_timm",
]

STUDENTS: dict[str, ERadioConfig | ViTConfig | TimmConfig] = {**E_RADIOS, **VITS, **TIMM_BACKBONES}


def create_student(name: str, **overrides: Any) -> Student:
    """A student with fresh weights, in training mode.

    name: one of `STUDENTS`, "timm:" and any model of timm, or "torch-module:" and an import path.
    overrides: fields of that student's config (`ERadioConfig`, `ViTConfig`); for timm and import paths, what
        `TimmBackbone` and `TorchModule` take.
    Raises: ConfigError for a name or a setting nobody knows, the nearest first, or for an impossible value.
    """
    if name.startswith("timm:"):
        return TimmBackbone(name.removeprefix("timm:"), **overrides)
    if name.startswith("torch-module:"):
        return TorchModule(name.removeprefix("torch-module:"), **overrides)
    if name not in STUDENTS:
        if is_model(name):
            raise ConfigError(f"no student is called '{name}', but a model of timm is: `--student timm:{name}`")
        raise ConfigError(
            unknown_name("student", name, STUDENTS, listed_by="radio-train --student help")
            + " timm:MODEL and torch-module:PACKAGE.MODULE:CLASS are students too."
        )
    config = STUDENTS[name]
    if isinstance(config, TimmConfig):
        settings: dict[str, Any] = {"preferred_resolution": (224, 224), **config.settings, **overrides}
        return TimmBackbone(config.model, name=name, **settings)
    known_settings = {field.name for field in fields(config)} - {"name"}
    for setting in overrides:
        if setting not in known_settings:
            raise ConfigError(unknown_name(f"setting of student '{name}'", setting, known_settings))
    match config:
        case ERadioConfig():
            return ERadio(replace(config, **overrides))
        case ViTConfig():
            student = ViT(replace(config, **overrides))
            if student.config.init_from is not None:
                initialise_from_timm(student, student.config.init_from, student.config.init_file)
            return student
