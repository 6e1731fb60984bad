"""Images with a class for every pixel: pairs of folders, and the layouts of ADE20K and Pascal VOC 2012."""

import hashlib
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evals.errors import EvalError
from evals.text_files import text_lines
from radio_cache.errors import ConfigError, ImageError
from radio_cache.images.decode import EXTENSIONS, MAX_PIXELS, decode_image, open_image, upright, upright_hw
from radio_cache.reader import digest

IGNORED = -1
"""The class of unlabelled pixels: they are neither trained on nor counted."""

_MASK_EXTENSIONS = (".png", ".bmp", ".tif", ".tiff", ".gif")
_VOC = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
_ADE_CLASSES = 150
_LARGEST_CLASS = 4096
"""Far above any list of classes: larger ids are an ignore index, or count instances."""

_STORED = re.compile(r"(?:L|1);(?P<bits>\d?)(?P<inverted>I?)R?\Z")
"""PIL's raw mode of grey values that it converts while it loads them: "L;4", "L;2I", "1;I"."""


@dataclass(frozen=True)
class MaskFormat:
    """The meaning of the numbers in a mask.

    Attributes:
        class_names: empty if there is no list; the masks then define how many classes there are, named by their numbers.
        first_id: the number of class 0; the next number is class 1.
        ignore: the number of unlabelled pixels.
    """

    class_names: tuple[str, ...] = ()
    first_id: int = 0
    ignore: int = 255


@dataclass(frozen=True)
class MaskedImages:
    """Images and their masks, pair by pair.

    Attributes:
        location: of both, as the user typed it.
        keys: unique names.
        images, masks: files.
        format: of the masks.
        left_out: number of images in the folder without a mask.
    """

    location: str
    keys: tuple[str, ...]
    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    format: MaskFormat
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, position: int) -> Image.Image:
        """Return the image, upright and RGB. Raises EvalError naming the file."""
        path = self.images[position]
        try:
            return decode_image(path.read_bytes(), max_pixels=MAX_PIXELS)
        except (ImageError, OSError) as exc:
            raise EvalError(f"{path}: {exc}; remove the image and its mask, or repair it") from exc

    def classes(self, position: int, image_hw: tuple[int, int]) -> NDArray[np.int16]:
        """Return (h, w) the class of every pixel, IGNORED for unlabelled ones.

        Raises:
            EvalError: if the mask differs from its image in size, or holds ids outside the list of classes.
        """
        path, ids = self.masks[position], self._ids(position)
        if ids.shape != image_hw:
            raise EvalError(
                f"{path} is {ids.shape[1]} x {ids.shape[0]} pixels, its image {self.images[position]} is {image_hw[1]} x "
                f"{image_hw[0]}: a mask has one pixel per pixel of the image"
            )
        # int64: ids of 32-bit masks would overflow the subtraction in a narrower type.
        classes = ids.astype(np.int64) - self.format.first_id
        # Ids below the first class are unlabelled as well, as 0 is in ADE20K.
        unlabelled = (ids == self.format.ignore) | (classes < 0)
        names = self.format.class_names
        # An id beyond the list is an error: silently ignoring it would change the score.
        if names and (outside := classes[~unlabelled & (classes >= len(names))]).size:
            raise EvalError(
                f"{path} holds the id {int(outside[0]) + self.format.first_id} ({outside.size:,} pixels), the list of classes "
                f"ends at {len(names) - 1 + self.format.first_id}: give the whole list by --classes, or the id of unlabelled "
                "pixels by --ignore"
            )
        classes[unlabelled] = IGNORED
        if classes.size and classes.max() > _LARGEST_CLASS:
            raise EvalError(
                f"{path} holds the id {int(classes.max()) + self.format.first_id}; classes are at most {_LARGEST_CLASS:,}. If it "
                "marks unlabelled pixels, give it by --ignore"
            )
        # _LARGEST_CLASS fits, and a set of masks takes a quarter of the memory.
        return classes.astype(np.int16)

    def at(self, positions: NDArray[np.int64]) -> "MaskedImages":
        """Return the pairs at these positions."""
        chosen = positions.tolist()
        return replace(
            self,
            keys=tuple(self.keys[p] for p in chosen),
            images=tuple(self.images[p] for p in chosen),
            masks=tuple(self.masks[p] for p in chosen),
        )

    def limited(self, limit: int | None, seed: int) -> "MaskedImages":
        """Return at most `limit` pairs, drawn at random."""
        if limit is None or limit >= len(self):
            return self
        return self.at(np.sort(np.random.default_rng(seed).choice(len(self), limit, replace=False)))

    def largest_class(self) -> int:
        """Return the highest class in any mask; IGNORED if no pixel is labelled."""
        largest = IGNORED
        for position in range(len(self)):
            # Unique values first: a mask has megapixels and few classes.
            ids = np.unique(self._ids(position)).astype(np.int64)
            if (too_large := ids[(ids != self.format.ignore) & (ids - self.format.first_id > _LARGEST_CLASS)]).size:
                raise EvalError(
                    f"{self.masks[position]} holds the id {int(too_large[0])}; classes are at most {_LARGEST_CLASS:,}. If it "
                    "marks unlabelled pixels, give it by --ignore"
                )
            largest = max(largest, *(ids[ids != self.format.ignore] - self.format.first_id).tolist(), IGNORED)
        return largest

    def unlabelled_share(self) -> float:
        """Return the share of pixels without a class: those of the ignore index, and those below the first class."""
        pixels = unlabelled = 0
        for position in range(len(self)):
            ids = self._ids(position)
            pixels += ids.size
            unlabelled += int(((ids == self.format.ignore) | (ids < self.format.first_id)).sum())
        return unlabelled / max(1, pixels)

    def identity(self) -> dict[str, str | int]:
        """Return location, number and one hash over the hashes of all images and masks, for the record of a result."""
        # Masks are hashed as well: a corrected mask changes the score.
        masks = [digest(path.read_bytes()) for path in self.masks]
        files = b"".join(file_digest for pair in zip(self.image_digests, masks, strict=True) for file_digest in pair)
        return {
            "place": self.location,
            "images": len(self),
            "sha256_of_image_and_mask_digests": hashlib.sha256(files).hexdigest(),
        }

    @cached_property
    def image_digests(self) -> tuple[bytes, ...]:
        """BLAKE2b-128 of every image file."""
        return tuple(digest(path.read_bytes()) for path in self.images)

    def size_hw(self, position: int) -> tuple[int, int]:
        """Return height and width of an image, upright, from its header. Raises EvalError naming the file."""
        path = self.images[position]
        try:
            # The header is enough: pixels are decoded when the windows are cut.
            with path.open("rb") as file, open_image(file) as image:
                return upright_hw(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as exc:
            raise EvalError(f"{path}: {exc}; remove the image and its mask, or repair it") from exc

    def _ids(self, position: int) -> NDArray[np.integer]:
        """Return the numbers as they are stored, upright; the colours of a palette do not matter."""
        path = self.masks[position]
        try:
            with path.open("rb") as file, open_image(file) as mask:
                # RGB masks would need a table from colours to classes, for which there is no option.
                if mask.mode not in ("P", "L", "1", "I", "I;16", "I;16B"):
                    raise EvalError(
                        f"{path} is a picture in {mask.mode}: a mask holds one number per pixel (a palette or grey PNG), and "
                        "colours alone do not identify a class"
                    )
                # Read before the mask is loaded: loading replaces the raw mode.
                largest, bits, inverted = _scaling(mask)
                ids = np.asarray(upright(mask)).astype(np.int64)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as exc:
            raise EvalError(f"{path} cannot be read as a mask: {exc}") from exc
        # Undo what PIL did for display: first the inversion, then the stretch to 8 bits.
        if inverted:
            ids = largest - ids
        return ids // (largest // ((1 << bits) - 1))


def _scaling(mask: Image.Image) -> tuple[int, int, bool]:
    """Return how PIL changes the numbers of a mask while it loads it, which suits grey pictures only.

    Returns:
        The largest number after loading, to which PIL stretches fewer than 8 bits; the bits in the file; whether 0 is white
        in the file (TIFF), so that PIL inverts the numbers.
    """
    largest = {"1": 1, "L": 255}.get(mask.mode, 0)
    # The decoder's arguments hold the raw mode; PIL has no public name for it.
    tiles: list[Any] = cast(Any, mask).tile
    arguments: Any = tiles[0][3] if largest and tiles else ""
    stored = _STORED.match(str(arguments[0] if isinstance(arguments, tuple) else arguments))
    # Palettes, 8-bit grey and 16-bit values are loaded as they are.
    if stored is None:
        return 1, 1, False
    bits = 1 if largest == 1 else int(stored["bits"] or 8)
    return largest, bits, bool(stored["inverted"])


def mask_folders(images: Path, masks: Path, format: MaskFormat) -> MaskedImages:
    """Pair images and masks of two folders by their relative path without the extension.

    Args:
        images: folder.
        masks: folder.
        format: of the masks.

    Raises:
        EvalError: for missing folders, masks without an image, two files of one name, or no pair at all.
    """
    image_of, mask_of = _by_stem(images, EXTENSIONS), _by_stem(masks, frozenset(_MASK_EXTENSIONS))
    # A mask without an image is a mistake; an image without a mask is an unlabelled image.
    if orphans := sorted(mask_of.keys() - image_of.keys()):
        raise EvalError(
            f"{masks}: {len(orphans)} masks have no image in {images}, such as {orphans[0]}: an image and its mask have the "
            "same name up to the ending"
        )
    keys = sorted(mask_of)
    if not keys:
        raise EvalError(
            f"{masks} holds no masks ({', '.join(_MASK_EXTENSIONS)}) of the {len(image_of)} images in {images}"
        )
    return MaskedImages(
        location=f"{images}, {masks}",
        keys=tuple(keys),
        images=tuple(image_of[key] for key in keys),
        masks=tuple(mask_of[key] for key in keys),
        format=format,
        left_out=len(image_of) - len(keys),
    )


def ade20k(root: Path) -> tuple[MaskedImages, MaskedImages]:
    """Return training and validation images of the MIT Scene Parsing release of ADE20K: 150 classes, 0 is the ignore index.

    Class names are read from `objectInfo150.txt` if it exists.

    Raises:
        EvalError: if the folder has another layout.
    """
    _expect(root, ("images/training", "images/validation", "annotations/training", "annotations/validation"), "ADE20K")
    info = root / "objectInfo150.txt"
    # The release without the list of names is still usable.
    names = tuple(f"class {number}" for number in range(1, _ADE_CLASSES + 1))
    if info.exists():
        rows = [line.split("\t") for line in info.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]
        # The last column holds synonyms, of which the first is the usual name.
        names = tuple(row[-1].split(",")[0].strip() for row in rows)
        if len(names) != _ADE_CLASSES:
            raise EvalError(
                f"{info} names {len(names)} classes, ADE20K has {_ADE_CLASSES}: restore the file, or remove it"
            )
    # Ids beyond the list are an error; 0 is "other", below the first id.
    format = MaskFormat(names, first_id=1, ignore=0)
    train, test = (
        mask_folders(root / "images" / split_name, root / "annotations" / split_name, format)
        for split_name in ("training", "validation")
    )
    return train, test


def voc2012(root: Path) -> tuple[MaskedImages, MaskedImages]:
    """Return training and validation images of Pascal VOC 2012: 21 classes; 255 is the ignore index.

    With `SegmentationClassAug` and `trainaug.txt` beside the official folders, training uses the 10,582 augmented images of
    the literature.

    Args:
        root: VOC2012, VOCdevkit, or the folder above.

    Raises:
        EvalError: if the folder has another layout, or lists files that are missing.
    """
    root = next(
        (
            root / subfolder
            for subfolder in ("", "VOC2012", "VOCdevkit/VOC2012")
            if (root / subfolder / "JPEGImages").exists()
        ),
        root,
    )
    _expect(root, ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"), "Pascal VOC 2012")
    lists = root / "ImageSets/Segmentation"
    # Most papers train on these; the official 1,464 images give lower figures.
    augmented = (root / "SegmentationClassAug").exists() and (lists / "trainaug.txt").exists()
    format = MaskFormat(_VOC)

    def split_images(name: str, masks: Path) -> MaskedImages:
        # One name per line, without extension.
        names = (lists / f"{name}.txt").read_text(encoding="utf-8").split()
        image_paths, mask_paths = (
            tuple(root / f"JPEGImages/{n}.jpg" for n in names),
            tuple(masks / f"{n}.png" for n in names),
        )
        if missing := [path for path in (*image_paths, *mask_paths) if not path.exists()]:
            raise EvalError(f"{lists / name}.txt names {len(missing)} files that are not there, such as {missing[0]}")
        return MaskedImages(f"{root} ({name})", tuple(names), image_paths, mask_paths, format)

    train = (
        split_images("trainaug", root / "SegmentationClassAug")
        if augmented
        else split_images("train", root / "SegmentationClass")
    )
    return train, split_images("val", root / "SegmentationClass")


def class_list(text: str | None) -> tuple[str, ...]:
    """Parse `--classes`: a file with one name per line, a number of classes, or names with commas.

    Raises:
        ConfigError: if it is none of the three, or holds an empty or a repeated name.
    """
    if text is None:
        return ()
    if text.isdecimal():
        return tuple(f"class {number}" for number in range(int(text)))
    # A file goes before commas: its name may hold one.
    path = Path(text)
    if path.is_file():
        names = [line.strip() for line in text_lines(path, "--classes")]
    elif "," in text:
        names = [name.strip() for name in text.split(",")]
    else:
        raise ConfigError(
            f"--classes {text}: give a file with one name per line, the number of classes, or names with commas"
        )
    while names and not names[-1]:  # empty lines at the end of a file
        names.pop()
    if not names or not all(names):
        raise ConfigError(
            f"--classes {text}: line {names.index('') + 1 if names else 1} is empty; line n is the class of id n - 1"
        )
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"--classes {text}: '{repeated[0]}' is there twice")
    return tuple(names)


def split(pairs: MaskedImages, *, test_share: float, seed: int) -> tuple[MaskedImages, MaskedImages]:
    """Split pairs into training and test images by a seeded draw, for folders without a test part.

    Args:
        pairs: at least two.
        test_share: of the pairs, in (0, 1); both parts get at least one.
        seed: of the draw.

    Raises:
        EvalError: for a single pair.
    """
    if len(pairs) < 2:
        raise EvalError(f"{pairs.location} has one image with a mask: it takes one to train on and another to test")
    # At least one pair on either side.
    count = min(len(pairs) - 1, max(1, round(test_share * len(pairs))))
    order = np.random.default_rng(seed).permutation(len(pairs))
    return pairs.at(np.sort(order[count:])), pairs.at(np.sort(order[:count]))


def _expect(root: Path, folders: tuple[str, ...], data_set: str) -> None:
    """Raise EvalError if the data set lacks one of its folders."""
    if missing := [name for name in folders if not (root / name).is_dir()]:
        raise EvalError(f"{root} is not laid out as {data_set}: it has no folder {missing[0]}")


def _by_stem(folder: Path, extensions: frozenset[str]) -> dict[str, Path]:
    """Return relative path without extension -> file."""
    if not folder.is_dir():
        raise EvalError(f"there is no folder {folder}")
    path_of: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in extensions and path.is_file():
            # Folders below are part of the key, so that the same name may occur in several.
            key = path.relative_to(folder).with_suffix("").as_posix()
            if key in path_of:
                raise EvalError(f"{path_of[key]} and {path} have the same name up to the ending: which one is meant?")
            path_of[key] = path
    return path_of
