"""A user's own network as a student."""

import sys
from pathlib import Path

import pytest
import torch

from radio_cache.errors import ConfigError
from trainer.students import UnsupportedResolutionError, create_student

OWN_FILE = """
import torch
from torch import nn

class Map(nn.Sequential):
    def __init__(self, width=8, stride=16):
        super().__init__(nn.Conv2d(3, width, stride, stride), nn.BatchNorm2d(width))

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 16, 16)
        self.head = nn.Linear(8, 5)
    def forward(self, x):
        y = self.conv(x)
        return self.head(y.amax((2, 3))), y

class Tokens(Map):
    def forward(self, x):
        return super().forward(x).flatten(2)

class NotANet:
    def __init__(self):
        raise AssertionError("called before its type was looked at")

class Failing(Map):
    def __init__(self):
        raise OSError("no such file")

def settings():
    raise AssertionError("called before its type was looked at")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_own_nets.py").write_text(OWN_FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_own_nets", raising=False)
    return "torch-module:my_own_nets"


def test_a_map_becomes_a_student_with_its_mean_as_summary(own: str) -> None:
    student = create_student(f"{own}:Map", width=12, stride=8)
    assert (student.name, student.patch_size, student.embed_dim) == (f"{own}:Map", 8, 12)
    assert student.training
    assert all(child.training for child in student.modules())
    out = student(torch.rand(2, 3, 32, 48))
    assert out.spatial.shape == (2, 4 * 6, 12)
    torch.testing.assert_close(out.summary, out.spatial.mean(1))


def test_a_pair_keeps_its_own_summary(own: str) -> None:
    student = create_student(f"{own}:Pair", preferred_resolution=(64, 32), min_resolution_step=32)
    assert (student.summary_dim, student.embed_dim, student.preferred_resolution) == (5, 8, (64, 32))
    assert student(torch.rand(2, 3, 64, 32)).summary.shape == (2, 5)
    with pytest.raises(UnsupportedResolutionError, match="got 48 x 64: resize to 64 x 64"):
        student(torch.rand(2, 3, 48, 64))


def test_a_network_of_one_size_says_so(own: str) -> None:
    student = create_student(f"{own}:Map", preferred_resolution=(64, 64), fixed_resolution=True)
    with pytest.raises(UnsupportedResolutionError, match="takes exactly 64 x 64"):
        student(torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("my_own_nets", {}, "takes an import path such as"),
        ("my_own_nets:Nope", {}, "cannot be imported .*Nope.*on PYTHONPATH"),
        ("no_such_package:Net", {}, "cannot be imported .*no_such_package"),
        ("my_own_nets:settings", {}, "is a function, not a class of nn.Module"),
        ("my_own_nets:NotANet", {}, "is a class that does not derive from nn.Module"),
        ("my_own_nets:Map.conv", {}, "takes an import path such as"),
        (".my_own_nets:Map", {}, "takes an import path such as"),
        ("my_own_nets:Failing", {}, "cannot be made: OSError: no such file"),
        ("my_own_nets:Map", {"widht": 3}, r"does not take the settings \['widht'\]"),
        ("my_own_nets:Tokens", {}, r"it returns \(1, 8, 196\); expected is a map"),
        ("my_own_nets:Map", {"preferred_resolution": (8, 8)}, "cannot take an image of 8 x 8 pixels"),
        ("my_own_nets:Map", {"preferred_resolution": (64, 70)}, "no whole stride"),
    ],
)
def test_what_cannot_be_a_student_is_told_with_the_reason(
    own: str, path: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        create_student(f"torch-module:{path}", **options)
