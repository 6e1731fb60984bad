"""Students whose network is the big model's own encoder, and whose heads do nothing: they must be told apart by nothing."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from trainer.adaptors import TeacherWidths
from trainer.distilled import DistilledStudent, StudentConfig, build_distilled

OWN_FILE = """
import torch
from torch import nn
from trainer.students.base import CLIP_MEAN, CLIP_STD

MADE = {}

def column(values):
    return torch.tensor(tuple(values)).view(1, 3, 1, 1)

class Encoder(nn.Module):
    '''A library's encoder behind a student's colours. make() -> (network, its mean, its std, call(network, images)).'''
    def __init__(self):
        super().__init__()
        self.net, self.mean, self.std, self.call = MADE["make"]()
    def forward(self, x):
        pixels = x * column(CLIP_STD) + column(CLIP_MEAN)
        return self.call(self.net, (pixels - column(self.mean)) / column(self.std))
"""

AsStudent = Callable[..., DistilledStudent]


@pytest.fixture
def as_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsStudent:
    (tmp_path / "library_encoder.py").write_text(OWN_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "library_encoder", raising=False)

    def make(teacher: str, made, *, image_hw: tuple[int, int]) -> DistilledStudent:
        import library_encoder

        library_encoder.MADE["make"] = lambda: made
        overrides = {"preferred_resolution": image_hw, "fixed_resolution": True}
        config = {"student": "torch-module:library_encoder:Encoder", "overrides": overrides, "image_hw": image_hw,
                  "fit": "squash", "adaptor_width": 4, "seed": 0, "steps": 1, "images_seen": 1, "cache": "", "run": "",
                  "recipe": ""}  # fmt: skip
        probe = build_distilled(
            StudentConfig(teachers=(TeacherWidths(name="x", summary_dim=2, spatial_dim=2),), **config)
        )
        known = TeacherWidths(name=teacher, summary_dim=probe.summary_dim, spatial_dim=probe.embed_dim)
        model = build_distilled(StudentConfig(teachers=(known,), **config)).eval()
        model.adaptors.summary_heads[0] = nn.Identity()
        model.adaptors.spatial_heads[0] = nn.Identity()
        return model

    return make


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
            student="e-radio-tiny", overrides=overrides, image_hw=(64, 64), fit="squash", teachers=teachers, adaptor_width=16,
            seed=0, steps=1, images_seen=1, cache="", run="", recipe="", adaptor="residual-mlp", adaptor_upsample=2,
        )
    ).eval()  # fmt: skip
