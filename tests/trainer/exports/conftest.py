from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.model.adaptors import TeacherWidths
from trainer.model.files import save_student
from trainer.model.student import StudentConfig, build_distilled

SMALL_E_RADIO = {
    "width": 8,
    "stem_width": 8,
    "depths": (1, 1, 1, 1),
    "heads": (2, 2),
    "windows": (2, 2),
    "bias_hidden": 8,
}
SMALL_VIT = {"width": 24, "depth": 3, "heads": 2, "num_summary_tokens": 1, "spectral_reparam": True}

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A finished run without training: a small student of 64 x 96 pixels, batch norms with statistics, two teachers."""

    def make(student: str = "e-radio-tiny", overrides: dict[str, Any] | None = None, **changes: Any) -> Path:
        known = {"e-radio-tiny": SMALL_E_RADIO, "vit-tiny-16": SMALL_VIT}
        settings: dict[str, Any] = {
            "student": student,
            "overrides": known.get(student, {}) if overrides is None else overrides,
            "image_hw": (64, 96),
            "fit": "squash",
            "teachers": (
                TeacherWidths(name="clip-a", summary_dim=6, spatial_dim=8),
                TeacherWidths(name="sam.b", summary_dim=None, spatial_dim=5),
            ),
            "adaptor_width": 16,
            "seed": 0,
            "steps": 7,
            "images_seen": 28,
            "cache": str(tmp_path / "gone.zarr"),
            "run": "run",
            "recipe": "tiny",
            "adaptor": "residual-mlp",
            "adaptor_blocks": 1,
            "adaptor_upsample": 2,
        }
        config = StudentConfig(**(settings | changes))
        model = build_distilled(config)
        with torch.no_grad():
            model(torch.rand(4, 3, *config.image_hw))
        save_student(model.eval(), tmp_path / "run")
        return tmp_path / "run"

    return make
