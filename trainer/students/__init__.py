"""Students: the networks that learn from the cached features.

`create_student("e-radio-b")` builds one by name; `create_student("timm:convnext_base")` takes any backbone of timm,
`create_student("torch-module:my_package.my_file:MyNet")` a network of your own.
"""

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from timm.models import is_model

from radio_cache.allowed_modules import refuse_unless_allowed, split_path
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
    "foreign_module",
    "initialise_from_timm",
    "is_of_timm",
    "refuse_foreign_code",
]

_TORCH_MODULE = "torch-module:"

STUDENTS: dict[str, ERadioConfig | ViTConfig | TimmConfig] = {**E_RADIOS, **VITS, **TIMM_BACKBONES}


def refuse_foreign_code(name: str, allow_modules: Iterable[str] = ()) -> None:
    """Raise ConfigError for a student's name from a file that leads to code which the caller did not allow.

    Args:
        name: as `create_student` takes it.
        allow_modules: see `radio_cache.allowed_modules.refuse_unless_allowed`.
    """
    if name.startswith(_TORCH_MODULE):
        refuse_unless_allowed(name.removeprefix(_TORCH_MODULE), allow_modules, what=f"student '{name}'")


def is_of_timm(name: str) -> bool:
    """Return whether a student's name stands for a model of timm."""
    return name.startswith("timm:") or isinstance(STUDENTS.get(name), TimmConfig)


def foreign_module(name: str) -> str | None:
    """Return the module that a student's name imports; None for students of radio-cache and of timm."""
    if not name.startswith(_TORCH_MODULE):
        return None
    return split_path(name.removeprefix(_TORCH_MODULE), what=f"student '{name}'")[0]


def create_student(name: str, **overrides: Any) -> Student:
    """Create a student with fresh weights, in training mode.

    Args:
        name: one of `STUDENTS`, "timm:" and any model of timm, or "torch-module:" and an import path, which is imported. Names
            from files must pass `refuse_foreign_code` first.
        overrides: fields of that student's config (`ERadioConfig`, `ViTConfig`); for timm and import paths, arguments of
            `TimmBackbone` and `TorchModule`.

    Raises:
        ConfigError: for an unknown name or setting, with the nearest known ones, or an impossible value.
    """
    if name.startswith("timm:"):
        return TimmBackbone(name.removeprefix("timm:"), **overrides)
    if name.startswith(_TORCH_MODULE):
        return TorchModule(name.removeprefix(_TORCH_MODULE), **overrides)
    if name not in STUDENTS:
        if is_model(name):
            raise ConfigError(f"no student is called '{name}', but a model of timm is: `--student timm:{name}`")
        raise ConfigError(
            unknown_name("student", name, STUDENTS, listed_by="radio-train --student help")
            + " timm:MODEL and torch-module:PACKAGE.MODULE:CLASS are also valid."
        )
    config = STUDENTS[name]
    # Models of AM-RADIO's table are compared at 224 px. Their own settings and the caller's may differ.
    if isinstance(config, TimmConfig):
        settings: dict[str, Any] = {"preferred_resolution": (224, 224), **config.settings, **overrides}
        return TimmBackbone(config.model, name=name, **settings)
    # The name is how a student is found in `STUDENTS`, and no setting.
    known_settings = {field.name for field in fields(config)} - {"name"}
    for setting in overrides:
        if setting not in known_settings:
            raise ConfigError(unknown_name(f"setting of student '{name}'", setting, known_settings))
    try:
        match config:
            case ERadioConfig():
                return ERadio(replace(config, **overrides))
            case ViTConfig():
                student = ViT(replace(config, **overrides))
    except (TypeError, IndexError, ZeroDivisionError, RuntimeError) as exc:
        if "memory" in str(exc):  # of the machine, not of the settings
            raise
        line = next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
        raise ConfigError(f"student '{name}' cannot be made with the settings {overrides}: {line:.200}") from exc
    if student.config.init_from is not None:
        initialise_from_timm(student, student.config.init_from, student.config.init_file)
    return student
