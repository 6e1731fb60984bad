"""Sparse members of tars: every format of GNU tar, read back byte by byte, and maps that do not fit."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cache_builder.sources import list_images
from radio_cache.errors import ImageError
from radio_cache.images.containers import read_image
from radio_cache.images.sparse_members import expanded

FORMATS = ["gnu", "posix --sparse-version=0.0", "posix --sparse-version=0.1", "posix --sparse-version=1.0"]


@pytest.fixture
def photos(tmp_path: Path) -> dict[str, bytes]:
    """Files with many holes, one hole, a hole at each end, nothing but a hole, and none; a long name."""
    if shutil.which("tar") is None or "GNU" not in subprocess.check_output(["tar", "--version"], text=True):
        pytest.skip("there is no GNU tar")
    noise = np.random.default_rng(0).integers(1, 256, 4096, np.uint8).tobytes()
    hole = bytes(1 << 16)
    contents = {
        "many.bmp": (noise + hole) * 40 + noise,
        "one.bmp": noise + hole + noise[:100],
        "ends.bmp": hole + noise + hole,
        "hole.bmp": hole,
        "none.bmp": noise,
        f"{'long/' * 30}name.bmp": (hole + noise) * 2,
    }
    for name, data in contents.items():
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as out:
            for at in range(0, len(data), 4096):
                if any(data[at : at + 4096]):
                    out.seek(at)
                    out.write(data[at : at + 4096])
            out.truncate(len(data))
    return contents


@pytest.mark.parametrize("format", FORMATS)
def test_every_sparse_member_is_read_as_the_file_that_was_packed(
    photos: dict[str, bytes], tmp_path: Path, format: str
) -> None:
    archive = tmp_path / "photos.tar"
    command = ["tar", "-S", "--hole-detection=raw", *f"--format={format}".split(), "-cf", str(archive)]
    subprocess.run([*command, "-C", str(tmp_path / "photos"), *sorted(photos)], check=True)
    assert archive.stat().st_size < sum(map(len, photos.values())) // 2
    listing = list_images([str(archive)])
    index = listing.index
    assert (index.length < -1).sum() >= 4
    for row, key in enumerate(index.keys):
        data = read_image(listing.containers[0], key, int(index.offset[row]), int(index.length[row]))
        assert data == photos[key.removeprefix("photos.tar/")], key


def test_a_map_that_does_not_fit_is_an_unusable_image(photos: dict[str, bytes], tmp_path: Path) -> None:
    archive = tmp_path / "photos.tar"
    command = ["tar", "-S", "--hole-detection=raw", "--format=posix", "--sparse-version=0.1", "-cf", str(archive)]
    subprocess.run([*command, "-C", str(tmp_path / "photos"), "one.bmp"], check=True)
    index = list_images([str(archive)]).index
    stored = archive.read_bytes()[: -int(index.length[0])]
    assert expanded(stored) == photos["one.bmp"]
    with pytest.raises(ImageError, match="the map of a sparse tar member does not fit what is stored of it"):
        expanded(stored.replace(b"map=0,4096,", b"map=0,9096,"))
    with pytest.raises(ImageError, match="the header of a sparse tar member is damaged"):
        expanded(stored.replace(b"map=0,4096,", b"map=0,4x96,"))
    with pytest.raises(ImageError, match="does not fit"):
        expanded(stored[:-1024])
    with pytest.raises(ImageError, match="no sparse member at its place"):
        expanded(bytes(2048))
