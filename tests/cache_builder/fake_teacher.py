"""Two teachers that need no weights, and the real `radio-cache` command with them: `python fake_teacher.py build ...`.

A module of its own because subprocesses need it too: `conftest.py` loads it for the tests.
"""

import time
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from cache_builder.teachers import FAMILIES, TEACHERS
from cache_builder.teachers.base import Features, Teacher
from cache_builder.teachers.preset import TeacherOptions, TeacherPreset, WeightsSource
from cache_builder.teachers.weights import describe_source, file_sha256
from radio_cache.format.schema import IMAGENET_PIXELS, TeacherSpec
from radio_cache.geometry.crops import patch_geometry

PATCH_PX = 8
CALL_SECONDS = 0.0
"""How long one call takes at least; the tests that kill a build set it."""


def preset(name: str) -> TeacherPreset:
    """Any file will do as weights: only its hash is used."""
    return TeacherPreset(
        name=name,
        family="fake",
        model="colours",
        params="0 M",
        licence="CC0-1.0",
        input_px=32,
        fit="squash",
        weights=WeightsSource(size="1 kB", package=("radio_cache", "__init__.py")),
    )


PRESETS = (preset("fake-a"), preset("fake-maps"))


@final
class FakeTeacher(Teacher):
    """Colours of patches through a fixed random matrix: 5 channels, and for fake-a a summary of 4."""

    def __init__(self, preset: TeacherPreset, path: Path, options: TeacherOptions) -> None:
        with_summary = preset.name == "fake-a"
        generator = torch.Generator().manual_seed(len(preset.name))
        self._matrix = torch.randn(3, 5, generator=generator)
        self.notes = (f"{preset.name} is made up",)
        size = options.size_px or preset.input_px
        self.spec = TeacherSpec(
            name=preset.name,
            family=preset.family,
            model=preset.model,
            licence=preset.licence,
            weights=describe_source(preset.weights, path, options.weights),
            weights_sha256=file_sha256(path),
            geometry=patch_geometry(size, PATCH_PX, fit=options.fit or preset.fit, interpolation="bilinear"),
            normalisation=IMAGENET_PIXELS,
            summary_dim=4 if with_summary else None,
            spatial_dim=5,
            summary_note="first four channels, averaged",
            spatial_note="colour of the patch",
            compute_dtype=options.dtype,
            codec=options.codec,
            views=1,
            software={"torch": torch.__version__},
        )

    def __call__(self, images: Tensor) -> Features:
        time.sleep(CALL_SECONDS)
        spatial = avg_pool2d(images, PATCH_PX).permute(0, 2, 3, 1) @ self._matrix
        return Features(spatial[..., :4].mean(dim=(1, 2)) if self.spec.summary_dim else None, spatial)

    def to(self, device: torch.device) -> None:
        self._matrix = self._matrix.to(device)


def settings(images: Path, out: Path) -> dict[str, Any]:
    """Of a build of the ten images, in shards of three, by both teachers."""
    return {
        "images": (str(images),),
        "teachers": {one.name: TeacherOptions() for one in PRESETS},
        "out": out,
        "shard_images": 3,
        "batch_size": 2,
        "threads": 2,
    }


def register() -> None:
    """Make the two teachers known in this process."""
    FAMILIES["fake"] = FakeTeacher  # type: ignore[assignment]
    TEACHERS.update({one.name: one for one in PRESETS})


if __name__ == "__main__":
    from cache_builder.cli import main

    register()
    main()
