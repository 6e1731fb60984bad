"""Random weights of the right shapes, for measuring the speed of a teacher without its published weights."""

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
    """Yield a weights file in the family's own format, in float16, and remove it afterwards.

    Args:
        preset: the teacher.

    Raises:
        ConfigError: the family's networks cannot be built without a file.
    """
    if preset.family not in _MAKERS:
        raise ConfigError(
            f"teacher '{preset.name}': --no-weights knows the families {', '.join(_MAKERS)}, not {preset.family}: "
            "pass --weights FILE"
        )
    prefix, build = _MAKERS[preset.family]
    with tempfile.TemporaryDirectory(prefix="radio-cache-random-") as folder:
        path = Path(folder) / "random.pth"
        # Through a file, so that a measurement loads weights exactly as a build does.
        torch.save({prefix + key: _half(value) for key, value in build(preset.model).state_dict().items()}, path)
        yield path


def _half(value: Tensor) -> Tensor:
    """Return a tensor in half precision; integers stay as they are."""
    return value.half() if value.is_floating_point() else value


def _timm(model: str) -> nn.Module:
    """Build a model of timm, with a classifier where files of the family have one."""
    import timm

    return timm.create_model(model, pretrained=False, num_classes=0 if "dinov2" in model else 1000)


def _open_clip(model: str) -> nn.Module:
    """Build the image tower of a model of open_clip."""
    import open_clip

    # open_clip has no public function that builds the image tower alone.

    whole = open_clip.create_model(model, pretrained=None)
    return cast(nn.Module, whole.visual)


def _sam(model: str) -> nn.Module:
    """Build the image encoder of a SAM."""
    from segment_anything import sam_model_registry

    return sam_model_registry[model]().image_encoder


# Only families with published weights in one format; a "torch-module" has a user's own.
_MAKERS: dict[str, tuple[str, Callable[[str], nn.Module]]] = {
    "clip": ("visual.", _open_clip),
    "dinov2": ("", _timm),
    "sam": ("image_encoder.", _sam),
    "efficientnet-lite": ("", _timm),
    "dinov3": ("", _timm),
    "c-radio": ("", _timm),
    "timm": ("", _timm),
}
"""Family -> prefix of the tensors' names in its files, and the function that builds its network."""
