"""In the layout that a run chooses, students learn what they learn in the plain one.

In processes of their own: what is wrong in PyTorch's CPU library may end the process.
"""

import subprocess
import sys

import pytest
import torch

from trainer.recipes.presets import quick
from trainer.run.layout import memory_layout
from trainer.students import STUDENTS, create_student

FAMILIES = ("timm:fastvit_t8", "timm:repvgg_a0", "timm:mobileone_s0")
GIANTS = ("vit-h", "vit-so400m", "vit-g", "vit-l")
"""Two blocks of them are as good as all, and fit any machine."""

QUICK = ("e-radio-tiny", "vit-tiny-16", "timm:repvgg_a0")
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in (*STUDENTS, *FAMILIES)]

COMPARE = """
import sys
import torch
from torch import Tensor
from trainer.run.layout import memory_layout
from trainer.recipes.presets import quick
from trainer.students import create_student

torch.set_num_threads(1)
name, overrides = sys.argv[1], {"depth": 2} if sys.argv[2] == "short" else {}
side, batch = (96, 8) if name.startswith("timm:") else (64, 4)
as_asked = Tensor.contiguous

def learned(plain):
    # plain: nowhere another layout, whatever the student asks for
    if plain:
        Tensor.contiguous = lambda tensor, memory_format=None: as_asked(tensor)
    torch.manual_seed(0)
    student = create_student(name, **overrides)
    layout = torch.contiguous_format if plain else memory_layout(student, quick(), torch.device("cpu"))
    student.to(memory_format=layout)
    image_hw = student.fixed_resolution or student.nearest_supported_resolution(side, side)
    images = torch.rand(batch, 3, *image_hw, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    out = student(images.contiguous(memory_format=layout))
    loss = out.summary.square().mean() + out.spatial.square().mean()
    loss.backward()
    Tensor.contiguous = as_asked
    return loss.detach(), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

expected, got = learned(True), learned(False)
torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-6)
assert got[1].keys() == expected[1].keys()
scale = max(gradient.norm() for gradient in expected[1].values())
for key, gradient in expected[1].items():
    assert got[1][key].isfinite().all(), key
    error = (got[1][key] - gradient).norm() / max(gradient.norm(), 1e-4 * scale)
    assert error < 0.02, f"{key}: {error}"
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_student_learns_the_same_as_in_the_plain_layout(name: str) -> None:
    command = [sys.executable, "-c", COMPARE, name, "short" if name.startswith(GIANTS) else "whole"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", FAMILIES)
def test_networks_of_timm_keep_the_plain_layout_on_a_cpu(name: str) -> None:
    with torch.device("meta"):
        student, own = create_student(name), create_student("e-radio-tiny")
    assert memory_layout(student, quick(), torch.device("cpu")) == torch.contiguous_format
    assert memory_layout(student, quick(), torch.device("cuda")) == torch.channels_last
    assert memory_layout(own, quick(), torch.device("cpu")) == torch.channels_last
