"""One tiny cache, made once; tests that damage it get a copy."""

import shutil
from pathlib import Path

import pytest

from radio_cache import Cache
from radio_cache.testing import make_tiny_cache, write_images

UNUSABLE = "red/1.png"


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of five images."""
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder, per_class=5)
    return folder


@pytest.fixture(scope="session")
def whole_cache(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """Ten images in shards of four, one of them unusable; teachers fake-a (with summary) and fake-b (maps only)."""
    path = tmp_path_factory.mktemp("whole") / "cache.zarr"
    make_tiny_cache(path, photos, shard_images=4, unusable=[UNUSABLE])
    return path


@pytest.fixture
def cache_path(tmp_path: Path, whole_cache: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(whole_cache, tmp_path / "cache.zarr"))


@pytest.fixture
def cache(cache_path: Path) -> Cache:
    return Cache(cache_path)


@pytest.fixture
def shard_file(cache_path: Path) -> Path:
    """The second shard of fake-a's maps: rows 4 to 7, row 6 of which is the unusable image."""
    return cache_path / "teachers/fake-a/spatial/c/0/1/0/0/0"
