"""A small image set from a few photographs: a class is a photo, and no pixel is in both training and test crops.

Training crops are cut from one end of each photo, test crops from the other, with a gap between.
"""

import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cache_builder.sources.folder import walk_folder
from radio_cache.errors import ImageError, SourceError
from radio_cache.images.decode import decode_image

BUNDLED = {
    "skimage.data": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "chelsea.png",
        "coffee.png",
        "coins.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "retina.jpg",
        "rocket.jpg",
    ),
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
}
"""Photographs that ship inside scikit-image and scikit-learn, by package: 16 in all."""

MIN_PHOTO_SIDE_PX = 128
TRAIN_PART, TEST_PART = (0.0, 0.58), (0.62, 1.0)
"""Range of the longer side that each split is cut from. The gap keeps neighbouring pixels out of the test crops."""


@dataclass(frozen=True, kw_only=True)
class DemoImagesConfig:
    """The configuration of the demo's images.

    Attributes:
        train_crops: number of training crops per photo.
        test_crops: number of test crops per photo.
        crop_share: range of a crop's side, as a share of the shorter side of its part of the photo.
        max_side_px: larger crops are shrunk to this side.
        max_photos: largest number of photos from a folder, sampled by the seed.
        seed: of the sample and of the crops.
    """

    train_crops: int = 12
    test_crops: int = 8
    crop_share: tuple[float, float] = (0.35, 0.6)
    max_side_px: int = 192
    max_photos: int = 32
    seed: int = 0


@dataclass(frozen=True)
class DemoImages:
    """The image files of the demo.

    Attributes:
        train: folder of the training crops, with a subfolder per photo.
        test: folder of the test crops, with a subfolder per photo.
        photos: names of the photos, which are the classes.
        skipped: "name: reason" for each photo that could not be used.
    """

    train: Path
    test: Path
    photos: tuple[str, ...]
    skipped: tuple[str, ...]


def bundled_photos() -> dict[str, bytes]:
    """Return the files of the bundled photographs, by name. Needs no network.

    Raises:
        SourceError: if the installed version of a package lacks one.
    """
    photos: dict[str, bytes] = {}
    for package, files in BUNDLED.items():
        for file in files:
            path = importlib.resources.files(package).joinpath(file)
            if not path.is_file():
                raise SourceError(
                    f"{package} has no file {file}: install the versions of constraints.txt, or use --images FOLDER"
                )
            photos[Path(file).stem.replace("_", "-")] = path.read_bytes()
    return photos


def own_photos(folder: Path, config: DemoImagesConfig) -> dict[str, bytes]:
    """Return up to `max_photos` image files of a folder tree, by name.

    Raises:
        SourceError: for a missing folder.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder: --images takes a folder of at least two photos")
    images = walk_folder(folder).images
    # Sorted below, so that the seed picks the photos and their paths set the order of classes.
    order = np.random.default_rng(config.seed).permutation(len(images))[: config.max_photos]
    return {
        str(Path(images[i]).with_suffix("")).replace("/", "-"): (folder / images[i]).read_bytes() for i in sorted(order)
    }


def make_demo_images(photos: dict[str, bytes], out: Path, config: DemoImagesConfig) -> DemoImages:
    """Cut the photos into `out/train/<photo>/<n>.png` and `out/test/<photo>/<n>.png`.

    The same call makes the same files, and writes none if they exist.

    Args:
        photos: encoded image files by name.
        out: folder to write to.
        config: number and size of the crops.

    Raises:
        SourceError: if fewer than two photos can be used.
    """
    usable: dict[str, Image.Image] = {}
    skipped: list[str] = []
    for name, data in photos.items():
        try:
            # A file that cannot be decoded is skipped and reported: a folder of photos often has a few.
            image = decode_image(data)
            if min(image.size) < MIN_PHOTO_SIDE_PX:
                raise ImageError(
                    f"{image.width} x {image.height} pixels is too small to cut up (at least {MIN_PHOTO_SIDE_PX})"
                )
            usable[name] = image
        except ImageError as exc:
            skipped.append(f"{name}: {exc}")
    if len(usable) < 2:
        why = f" ({'; '.join(skipped[:3])})" if skipped else ""
        raise SourceError(
            f"the demo classifies crops by photo and needs at least two usable photos, not {len(usable)}{why}"
        )
    # Written after the last crop: without it, or with another recipe, the crops are cut again.
    done = out / "images.json"
    recipe = json.dumps({"photos": list(usable), **asdict(config)})
    if not done.exists() or done.read_text() != recipe:
        for number, (name, image) in enumerate(usable.items()):
            # Seeded per photo, so that the crops of one do not depend on the others.
            rng = np.random.default_rng((config.seed, number))
            _cut(image, out / "train" / name, TRAIN_PART, config.train_crops, config, rng)
            _cut(image, out / "test" / name, TEST_PART, config.test_crops, config, rng)
        done.write_text(recipe)
    return DemoImages(out / "train", out / "test", tuple(usable), tuple(skipped))


def _cut(
    image: Image.Image,
    folder: Path,
    part: Sequence[float],
    count: int,
    config: DemoImagesConfig,
    rng: np.random.Generator,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    w, h = image.size
    # Split along the longer side, which leaves the largest squares in both parts.
    along_x = w >= h
    x0, x1 = (int(part[0] * w), int(part[1] * w)) if along_x else (0, w)
    y0, y1 = (0, h) if along_x else (int(part[0] * h), int(part[1] * h))
    for number in range(count):
        # In pixels of the photo, not beyond either side of the part.
        side = int(rng.uniform(*config.crop_share) * min(x1 - x0, y1 - y0))
        left = x0 + int(rng.integers(0, x1 - x0 - side + 1))
        top = y0 + int(rng.integers(0, y1 - y0 - side + 1))
        crop = image.crop((left, top, left + side, top + side))
        if side > config.max_side_px:
            crop = crop.resize((config.max_side_px, config.max_side_px), Image.Resampling.LANCZOS)
        # Level 1: time matters here, and a few hundred kilobytes do not.
        crop.save(folder / f"{number:02d}.png", compress_level=1)
