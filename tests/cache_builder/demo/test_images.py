import hashlib
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache_builder.demo.images import DemoImagesConfig, bundled_photos, make_demo_images, own_photos
from radio_cache.errors import SourceError

FEW = DemoImagesConfig(train_crops=6, test_crops=4)


def photo(w: int, h: int) -> bytes:
    """A picture whose pixels say where they are: red counts columns, green rows, in steps of 4 pixels."""
    y, x = np.mgrid[0:h, 0:w]
    file = io.BytesIO()
    Image.fromarray(np.stack([x // 4, y // 4, 0 * x], axis=-1).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_sixteen_photographs_are_bundled() -> None:
    photos = bundled_photos()
    assert len(photos) == 16
    assert all(min(Image.open(io.BytesIO(data)).size) >= 256 for data in photos.values())


@pytest.mark.parametrize(("w", "h"), [(400, 300), (300, 500), (256, 256)])
def test_no_pixel_is_in_both_training_and_test_crops(tmp_path: Path, w: int, h: int) -> None:
    images = make_demo_images({"a": photo(w, h), "b": photo(w, h)}, tmp_path, FEW)
    along = 0 if w >= h else 1
    seen = {
        split: [np.asarray(Image.open(file))[..., along] for file in folder.rglob("*.png")]
        for split, folder in (("train", images.train), ("test", images.test))
    }
    assert len(seen["train"]) == 12
    assert len(seen["test"]) == 8
    assert max(pixels.max() for pixels in seen["train"]) < min(pixels.min() for pixels in seen["test"])


def test_the_same_call_makes_the_same_files_and_another_seed_others(tmp_path: Path) -> None:
    def digest(out: Path, config: DemoImagesConfig) -> str:
        made = make_demo_images({"a": photo(200, 200), "b": photo(300, 200)}, out, config)
        files = sorted((*made.train.rglob("*.png"), *made.test.rglob("*.png")))
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    assert digest(tmp_path / "1", FEW) == digest(tmp_path / "2", FEW) == digest(tmp_path / "1", FEW)
    assert digest(tmp_path / "3", replace(FEW, seed=1)) != digest(tmp_path / "1", FEW)


def test_photos_that_cannot_be_used_are_left_out_by_name(tmp_path: Path) -> None:
    photos = {"a": photo(200, 200), "b": photo(200, 200), "tiny": photo(40, 200), "text": b"not an image"}
    images = make_demo_images(photos, tmp_path, FEW)
    assert images.photos == ("a", "b")
    assert images.skipped == (
        "tiny: 40 x 200 pixels is too small to cut up (at least 128)",
        "text: not an image in a format PIL knows",
    )
    with pytest.raises(SourceError, match=r"needs at least two usable photos, not 1 \(text: not an image"):
        make_demo_images({"a": photo(200, 200), "text": b"x"}, tmp_path / "other", FEW)


def test_own_photos_come_from_a_folder_tree_up_to_a_limit(tmp_path: Path) -> None:
    (tmp_path / "holiday").mkdir()
    for number in range(5):
        (tmp_path / f"holiday/{number}.png").write_bytes(photo(200, 200))
    assert list(own_photos(tmp_path, FEW)) == [f"holiday-{number}" for number in range(5)]
    assert len(own_photos(tmp_path, replace(FEW, max_photos=3))) == 3
    with pytest.raises(SourceError, match="is not a folder"):
        own_photos(tmp_path / "holiday/0.png", FEW)
