"""Real photographs that install with a package, the way of an image to a teacher, and teachers without weights."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import skimage.data
import torch
from PIL import Image

from cache_builder.build import BuildConfig, BuildReport, build_cache
from cache_builder.pipeline.events import ReportedEvents
from cache_builder.pipeline.preprocess import teacher_input, view_pixels
from cache_builder.teachers import FAMILIES, TEACHERS
from cache_builder.teachers.base import Teacher
from radio_cache.geometry.crops import valid_hw
from radio_cache.testing import write_images

torch.set_num_threads(1)  # the machines that run this have few cores, and share them

FAKE_TEACHER = Path(__file__).with_name("fake_teacher.py")

PHOTOS = {
    "astronaut": (0, 0, 512, 512),
    "chelsea": (0, 0, 451, 300),
    "coffee": (0, 0, 600, 400),
    "odd": (3, 5, 340, 486),
    "wide": (7, 100, 508, 233),
    "tall": (100, 1, 201, 400),
    "small": (200, 90, 261, 147),
}
"""Name -> crop. The last four are odd in size, far from square, or smaller than any teacher's input."""


@pytest.fixture(scope="session", params=PHOTOS)
def photo(request: pytest.FixtureRequest) -> Image.Image:
    """Each photograph in turn."""
    return load_photo(request.param)


@pytest.fixture(scope="session")
def photos() -> dict[str, Image.Image]:
    """All of them by name."""
    return {name: load_photo(name) for name in PHOTOS}


def load_photo(name: str) -> Image.Image:
    source = name if name in ("chelsea", "coffee") else "astronaut"
    return Image.fromarray(getattr(skimage.data, source)()).crop(PHOTOS[name])


@pytest.fixture(scope="session")
def chelsea() -> Image.Image:
    """A cat."""
    return load_photo("chelsea")


@pytest.fixture(scope="session")
def coffee() -> Image.Image:
    """A cup of espresso."""
    return load_photo("coffee")


@pytest.fixture(scope="session")
def seen_by() -> Callable[[Teacher, Image.Image], torch.Tensor]:
    """(1, 3, h, w): what a teacher receives of an image in a build."""

    def see(teacher: Teacher, image: Image.Image) -> torch.Tensor:
        geometry = teacher.spec.geometry
        pixels = torch.from_numpy(view_pixels(image, geometry).copy())[None]
        return teacher_input(pixels, [valid_hw((image.height, image.width), geometry)], teacher.spec.normalisation)

    return see


@pytest.fixture(scope="session")
def fake_module() -> ModuleType:
    """`fake_teacher.py`, which pytest does not import by itself."""
    spec = importlib.util.spec_from_file_location("fake_teacher", FAKE_TEACHER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake_teachers(fake_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The names of two teachers that need no weights: one with a summary, one with maps only."""
    monkeypatch.setitem(FAMILIES, "fake", fake_module.FakeTeacher)
    for preset in fake_module.PRESETS:
        monkeypatch.setitem(TEACHERS, preset.name, preset)
    return tuple(preset.name for preset in fake_module.PRESETS)


@pytest.fixture
def build(
    fake_module: ModuleType, fake_teachers: object, tmp_path: Path, ten_images: Path
) -> Callable[..., BuildReport]:
    """build(teachers={...}, shard_images=3, ...) -> report. What is not said is as in `settings`; into out.zarr."""

    def run(**changes: Any) -> BuildReport:
        on_message = changes.pop("on_message", print)
        config = BuildConfig(**{**fake_module.settings(ten_images, tmp_path / "out.zarr"), **changes})
        return build_cache(config, ReportedEvents(on_message, log_json=config.log_json))

    return run


@pytest.fixture(scope="session")
def ten_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images of several sizes in two class folders. For reading only."""
    folder = tmp_path_factory.mktemp("ten")
    write_images(folder, classes=("ant", "bee"), per_class=4, size=41)
    for number, size in enumerate([(90, 33), (20, 64)]):
        chosen = load_photo("astronaut").crop((100, 40, 100 + size[0], 40 + size[1]))
        chosen.save(folder / "bee" / f"photo{number}.png")
    return folder
