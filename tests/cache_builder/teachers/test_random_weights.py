"""Random weights load as real ones do."""

from typing import Any

import pytest

from cache_builder.teachers import FAMILIES, TEACHERS, TeacherOptions
from cache_builder.teachers.random_weights import random_weights
from radio_cache.errors import ConfigError


@pytest.mark.parametrize(
    "name",
    [
        "efficientnet-lite0",
        "dinov2-vit-s-14-reg",
        pytest.param("sam-vit-b", marks=pytest.mark.slow),
        pytest.param("openai-clip-vit-l-14-336", marks=pytest.mark.slow),
    ],
)
def test_every_family_loads_its_random_weights(name: str) -> None:
    preset = TEACHERS[name]
    with random_weights(preset) as path:
        teacher = FAMILIES[preset.family](preset, path, TeacherOptions())
        assert path.exists()
    assert teacher.spec.name == name
    assert not path.exists()


def test_a_family_without_random_weights_is_refused_by_name(fake_module: Any) -> None:
    with (
        pytest.raises(ConfigError, match=r"knows the families clip, .*, not fake: pass --weights FILE"),
        random_weights(fake_module.PRESETS[0]),
    ):
        pass
