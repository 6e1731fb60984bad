"""A weights file of the right shapes and no meaning: for measuring how long a teacher takes where its own is not here."""

import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from cache_builder.teachers.preset import TeacherPreset
from radio_cache.errors import ConfigError


@contextmanager
def random_weights(preset: TeacherPreset) -> Generator[Path]:
    """A file in the family's own format, float16, in a folder that is removed afterwards.

    Raises ConfigError for a family whose networks cannot be made without a file.
    """
    if preset.family not in _MAKERS:
        raise ConfigError(
            f"teacher '{preset.name}': --no-weights knows the families {', '.join(_MAKERS)}, not {preset.family}: "
            "pass --weights FILE"
        )
    prefix, make = _MAKERS[preset.family]
    with tempfile.TemporaryDirectory(prefix="radio-cache-random-") as folder:
        path = Path(folder) / "random.pth"
        torch.save({prefix + key: _small(value) for key, value in make(preset.model).state_dict().items()}, path)
        yield path


def _small(value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() else value


def _timm(model: str) -> nn.Module:
    import timm

    return timm.create_model(model, pretrained=False, num_classes=0 if "dinov2" in model else 1000)


def _open_clip(model: str) -> nn.Module:
    import open_clip

    whole = open_clip.create_model(model, pretrained=None)
    return cast(nn.Module, whole.visual)


def _sam(model: str) -> nn.Module:
    from segment_anything import sam_model_registry

    return sam_model_registry[model]().image_encoder


_MAKERS: dict[str, tuple[str, Callable[[str], nn.Module]]] = {
    "clip": ("visual.", _open_clip),
    "dinov2": ("", _timm),
    "sam": ("image_encoder.", _sam),
    "efficientnet-lite": ("", _timm),
    "dinov3": ("", _timm),
    "c-radio": ("", _timm),
    "timm": ("", _timm),
}
"""Family -> what its files put in front of the tensors' names, and how its library makes the network."""
