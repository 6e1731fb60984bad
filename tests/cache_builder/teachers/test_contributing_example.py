"""The example of CONTRIBUTING.md: a teacher in one file is registered, and builds a cache, as it stands there."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cache_builder.build import build_cache
from cache_builder.build_config import BuildConfig
from cache_builder.teachers import FAMILIES, TEACHERS, TeacherOptions, find_teacher, load_recorded
from radio_cache.reader import Cache
from radio_cache.testing import write_images

NAME = "patch-projection-16"


def example(heading: str) -> str:
    """The code block below a heading of CONTRIBUTING.md."""
    text = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [section] = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    [code] = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return code


def test_the_teacher_of_contributing_builds_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for table in (FAMILIES, TEACHERS):  # the example adds to both; this takes its lines out again
        for key in ("patch-projection", NAME):
            monkeypatch.setitem(table, key, None)  # type: ignore[arg-type]
            del table[key]
    exec(example("Adding a teacher"), {"__name__": "example"})
    preset = find_teacher(NAME)
    torch.manual_seed(0)
    weights = tmp_path / "weights.pth"
    torch.save(nn.Conv2d(3, 16, kernel_size=8, stride=8).state_dict(), weights)
    write_images(tmp_path / "images", per_class=2)

    options = TeacherOptions(weights=weights)
    images = (str(tmp_path / "images"),)
    build_cache(BuildConfig(images=images, teachers={NAME: options}, out=tmp_path / "cache.zarr", threads=1))
    cache = Cache(tmp_path / "cache.zarr")
    stored = cache.teachers[NAME]
    assert stored.spec.model == preset.model
    assert preset.output is not None
    assert stored.spec.geometry.grid_hw == (preset.output.tokens, preset.output.tokens)
    summaries = stored.summaries(range(4))
    assert summaries.shape == (4, preset.output.summary_dim)
    assert np.isfinite(summaries).all()
    teacher = load_recorded(stored.spec)
    features = teacher(torch.zeros(2, 3, 64, 64))
    assert features.spatial.shape == (2, 8, 8, preset.output.spatial_dim)
