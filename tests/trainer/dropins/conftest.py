"""A small student with heads for teachers of three kinds."""

import pytest
import torch

from trainer.model.adaptors import TeacherWidths
from trainer.model.student import DistilledStudent, StudentConfig, build_distilled


@pytest.fixture
def small_student() -> DistilledStudent:
    """A small E-RADIO with a head for a CLIP, a DINOv2 and a SAM, each of 32 channels, on twice its grid."""
    torch.manual_seed(0)
    overrides = {
        "width": 8,
        "stem_width": 8,
        "depths": (1, 1, 1, 1),
        "heads": (2, 2),
        "windows": (2, 2),
        "bias_hidden": 8,
    }
    teachers = tuple(
        TeacherWidths(name=name, summary_dim=dim, spatial_dim=32)
        for name, dim in (("clip", 24), ("dino", 32), ("sam", None))
    )
    return build_distilled(
        StudentConfig(
            student="e-radio-tiny",
            overrides=overrides,
            image_hw=(64, 64),
            fit="squash",
            teachers=teachers,
            adaptor_width=16,
            seed=0,
            steps=1,
            images_seen=1,
            cache="",
            run="",
            recipe="",
            adaptor="residual-mlp",
            adaptor_upsample=2,
        )
    ).eval()
