"""Images to evaluate on, and their classes: from a cache, a folder tree or WebDataset tars, all behind one interface."""

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cache_builder.sources import list_images
from evals.errors import EvalError
from radio_cache.errors import ImageError
from radio_cache.images.containers import read_image
from radio_cache.images.decode import MAX_PIXELS, decode_image
from radio_cache.reader import Cache, digest, is_cache
from radio_cache.storage.base import is_url

# BLAKE2b-128, as the build stores it.
_DIGEST_BYTES = 16


class ImageSource(ABC):
    """Images in one location. Rows number all images of the source, usable or not.

    Attributes:
        location: path, URL or pattern as the user typed it.
        labels: (n,) int64, -1 for images without a class.
        class_names: empty if classes are mere numbers.
    """

    location: str
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]

    @final
    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def key(self, row: int) -> str:
        """Return the name of an image, unique in the source."""

    @abstractmethod
    def decoded(self, row: int) -> Image.Image | None:
        """Return the image, upright and RGB; None for one that cannot be used and is left out, with the reason in `failures`.

        Raises:
            EvalError: if an image that was listed as usable is gone or damaged now.
        """

    @abstractmethod
    def digests(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return (len(rows), 16) BLAKE2b-128 of the image files; 0 where a file cannot be read."""

    @property
    def failures(self) -> dict[int, str]:
        """Rows that turned out to be unusable while they were read -> the reason."""
        return {}

    @property
    def notes(self) -> list[str]:
        """Remarks about how the images were read, one sentence each, to be printed below the figures."""
        return []


@final
class CacheImages(ImageSource):
    """The images of a cache: from their original files, or from the pixels that the cache keeps if a file is gone.

    Unusable images are known beforehand, from the build.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache, self.location = cache, cache.url
        self.labels, self.class_names = cache.index.labels.astype(np.int64), cache.meta.class_names
        self._rows_from_kept_pixels = set[int]()

    def key(self, row: int) -> str:
        """Return the key in the cache's index."""
        return self.cache.index.key(row)

    def decoded(self, row: int) -> Image.Image:
        """Return the image; every usable one of a cache can be decoded."""
        try:
            file, is_kept_copy = self.cache.read_original_or_kept(row)
            if is_kept_copy:
                self._rows_from_kept_pixels.add(row)
            return self.cache.decode(file)
        except ImageError as exc:
            # With kept pixels the message of the cache names the cure itself.
            cure = "bring the files back to where they were, or name other images" if self.cache.pixels is None else ""
            raise EvalError(f"image {self.key(row)} of {self.location}: {exc}" + (f"; {cure}" if cure else "")) from exc

    def digests(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the hashes that the build stored."""
        # No file is read: the identity of a cache's images is known even if they are gone.
        return self.cache.digests[rows]

    @property
    def notes(self) -> list[str]:
        """Remarks about images read over the web, or from the pixels that the cache keeps."""
        store, web = self.cache.meta.pixels, self.cache.remote_images_note()
        if not self._rows_from_kept_pixels or store is None:
            return [f"{web[0].upper()}{web[1:]}."] if web else []
        return [
            f"{len(self._rows_from_kept_pixels):,} image files of {self.location} are gone or changed: the pixels that the "
            f"cache keeps ({store}) were used for them."
        ]


@final
class ListedImages(ImageSource):
    """The images of a folder tree (the first folder is the class), of tars (`.cls` is the class), or of a pattern of tars.

    Files that cannot be decoded are left out when decoding fails: decoding all of them beforehand would take as long
    as the evaluation of a small model.

    Raises:
        SourceError: as `list_images` does.
    """

    def __init__(self, location: str, *, max_pixels: int = MAX_PIXELS) -> None:
        # The same listing as a build's --images, so that a folder and its cache agree on classes.
        listing = list_images([location])
        self.location, self.class_names = location, listing.class_names
        self.labels = listing.index.labels.astype(np.int64)
        self._notes = list(listing.notes)
        self._index, self._containers, self._max_pixels = listing.index, listing.containers, max_pixels
        self._digests = np.zeros((len(self.labels), _DIGEST_BYTES), np.uint8)
        self._is_hashed = np.zeros(len(self.labels), np.bool_)
        self._failures: dict[int, str] = {}

    def key(self, row: int) -> str:
        """Return the path below the folder, or in the tar."""
        return self._index.key(row)

    def decoded(self, row: int) -> Image.Image | None:
        """Return the image, or None, with an entry in `failures`, if its file cannot be decoded."""
        try:
            data = self._read(row)
            return decode_image(data, max_pixels=self._max_pixels)
        except ImageError as exc:
            self._failures[row] = str(exc)
            return None

    def digests(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the hashes; files that were not decoded yet are read for them."""
        for row in rows[~self._is_hashed[rows]]:
            with contextlib.suppress(ImageError):  # decoding the image reports the failure
                self._read(int(row))
        return self._digests[rows]

    @property
    def failures(self) -> dict[int, str]:
        """Rows whose files could not be decoded -> the reason."""
        return self._failures

    @property
    def notes(self) -> list[str]:
        """Remarks of the listing, such as files that are no images."""
        return self._notes

    def _read(self, row: int) -> bytes:
        index = self._index
        container = self._containers[index.container[row]]
        data = read_image(container, index.key(row), int(index.offset[row]), int(index.length[row]))
        # Every read leaves its hash, so that the identity of a set costs no second pass over the files.
        self._digests[row] = np.frombuffer(digest(data), np.uint8)
        self._is_hashed[row] = True
        return data


@dataclass(frozen=True)
class ImageSet:
    """A selection of the images of a source. Positions count the selected rows.

    Attributes:
        rows: (n,) of the source, ascending.
        labels: (n,) classes, -1 for none.
        class_names: empty if classes are mere numbers.
    """

    source: ImageSource
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def location(self) -> str:
        """The source's path, URL or pattern."""
        return self.source.location

    @property
    def cache(self) -> Cache | None:
        """The cache that the images come from; None for a folder or tars."""
        return self.source.cache if isinstance(self.source, CacheImages) else None

    def key(self, position: int) -> str:
        """Return the name of an image."""
        return self.source.key(int(self.rows[position]))

    def decoded(self, position: int) -> Image.Image | None:
        """Return the image, upright and RGB; None if it is left out. Raises EvalError as `ImageSource.decoded` does."""
        return self.source.decoded(int(self.rows[position]))

    def name_of(self, label: int) -> str:
        """Return the name of a class, or "class 7" if it has none."""
        return self.class_names[label] if 0 <= label < len(self.class_names) else f"class {label}"

    def at(self, positions: NDArray[np.int64]) -> "ImageSet":
        """Return the images at these positions."""
        return replace(self, rows=self.rows[positions], labels=self.labels[positions])

    def sampled(self, limit: int | None, seed: int) -> "ImageSet":
        """Return at most `limit` of the images, drawn at random, so that images sorted by class still give all classes."""
        if limit is None or limit >= len(self):
            return self
        # Sorted again: rows in ascending order are read shard by shard.
        return self.at(np.sort(np.random.default_rng(seed).choice(len(self), limit, replace=False)))

    def usable(self) -> "ImageSet":
        """Return the set without the images that turned out to be unusable while they were read."""
        # Failures grow while images are decoded, so this is called after the encoding.
        failures = self.source.failures
        return self if not failures else self.at(np.flatnonzero([row not in failures for row in self.rows.tolist()]))

    def identity(self) -> dict[str, str | int]:
        """Return location, counts and one hash over the hashes of the files, for the record of a result."""
        # One hash over all files: a changed, added or missing image changes it.
        digests = self.source.digests(self.rows)
        return {
            "place": self.location,
            "images": len(self.rows),
            "images_in_place": len(self.source),
            "sha256_of_image_digests": hashlib.sha256(digests.tobytes()).hexdigest(),
        }

    def copies(self) -> int:
        """Return the number of images that are byte for byte another of the set."""
        return len(self.rows) - len(_digest_set(self))

    def shared_with(self, other: "ImageSet") -> int:
        """Return the number of images whose very file is in the other set too."""
        other_digests = _digest_set(other)
        return sum(digest.tobytes() in other_digests for digest in self.source.digests(self.rows))


def open_source(location: str | Path) -> ImageSource:
    """Open a cache, a folder, a tar, a folder of tars or a pattern of tars (`train-{000..004}.tar`)."""
    # Only a path or URL is opened as a cache: a pattern of tars is no path at all.
    if is_url(location) or Path(location).suffix == ".zarr" or (Path(location) / "zarr.json").exists():
        return CacheImages(Cache(location))
    return ListedImages(str(location))


def image_set(
    source: ImageSource,
    *,
    teachers: Iterable[str] = (),
    labelled: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> ImageSet:
    """Select the usable images of a source.

    Args:
        source: where the images are.
        teachers: names; of a cache, only images with features of all of them.
        labelled: only images with a class.
        limit: at most this many, drawn at random, so that images sorted by class still give all classes.
        seed: of the draw.

    Raises:
        EvalError: if no image is left; the message names what is missing.
    """
    rows = np.arange(len(source))
    if isinstance(source, CacheImages):
        teachers = tuple(teachers)
        # Images that failed in the build, or that a teacher lacks, are left out at once.
        rows = source.cache.usable_rows(teachers)
        if len(rows) == 0:
            raise EvalError(
                f"{source.location} has no finished images"
                + (f" for {', '.join(teachers)}" if teachers else "")
                + f" ({len(source)} are listed): run the build again"
            )
    # Images at the top of a folder tree, or without a .cls, have the label -1.
    if labelled:
        rows = rows[source.labels[rows] >= 0]
        if len(rows) == 0:
            cure = "build it from" if isinstance(source, CacheImages) else "this takes"
            raise EvalError(
                f"{source.location} has no labels, which this evaluation needs: {cure} a folder with one subfolder per class, or "
                "tars with a .cls for each image"
            )
    return ImageSet(source, rows, source.labels[rows], source.class_names).sampled(limit, seed)


def in_classes_of(bank: ImageSet, queries: ImageSet) -> ImageSet:
    """Return the queries with the class numbers of the bank; classes are matched by their names.

    Args:
        bank: labelled images.
        queries: labelled images; each of their classes has to be one of the bank's.

    Raises:
        EvalError: if the queries have classes that the bank lacks, or only one of the two has names.
    """
    if bool(bank.class_names) != bool(queries.class_names):
        locations = (bank.location, queries.location)
        named, numbered = locations if bank.class_names else locations[::-1]
        raise EvalError(f"{named} names its classes and {numbered} only numbers them: they cannot be matched")
    # Numbers without names are taken to mean the same in both.
    if not bank.class_names:
        return queries
    number_of = {name: number for number, name in enumerate(bank.class_names)}
    names = [queries.class_names[label] for label in np.unique(queries.labels)]
    unknown = [name for name in names if name not in number_of]
    if unknown:
        listed = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise EvalError(
            f"{len(unknown)} of the {len(names)} classes of {queries.location} are not classes of {bank.location} ({listed}): "
            "bank and queries need the same class names"
        )
    # A table from old to new numbers; classes without images stay at -1.
    renumbered = np.full(len(queries.class_names), -1, dtype=np.int64)
    for label, name in enumerate(queries.class_names):
        renumbered[label] = number_of.get(name, -1)
    return replace(queries, labels=renumbered[queries.labels], class_names=bank.class_names)


def _digest_set(images: ImageSet) -> set[bytes]:
    return {digest.tobytes() for digest in images.source.digests(images.rows)}


__all__ = [
    "CacheImages",
    "ImageSet",
    "ImageSource",
    "ListedImages",
    "image_set",
    "in_classes_of",
    "is_cache",
    "open_source",
]
