"""A cache of every codec, made once, with a padded teacher and an image that cannot be used."""

from pathlib import Path

import pytest

from radio_cache import Cache
from radio_cache.codecs.calibrate import CodecRequest
from radio_cache.testing import make_tiny_cache, write_images

UNUSABLE = "red/1.png"


@pytest.fixture(scope="session")
def source_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighteen images in shards of four; `packed` and `zstd` of one klt basis each, `int8`, and `half`, maps only."""
    folder = tmp_path_factory.mktemp("source")
    write_images(folder / "photos", classes=("blue", "green", "red"), per_class=6)
    make_tiny_cache(
        folder / "source.zarr",
        folder / "photos",
        shard_images=4,
        unusable=[UNUSABLE],
        teachers={"packed": (6, 16), "zstd": (None, 16), "int8": (3, 5), "half": (None, 5)},
        codecs={
            "packed": CodecRequest(packing="packed", fidelity=0.97),
            "zstd": CodecRequest(packing="zstd", fidelity=0.97),
            "int8": CodecRequest(name="int8"),
        },
    )
    return folder / "source.zarr"


@pytest.fixture
def source(source_path: Path) -> Cache:
    return Cache(source_path)
