"""Images to evaluate on, and their classes: of a cache, a folder tree or WebDataset tars, all alike."""

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

_DIGEST_BYTES = 16


class ImageSource(ABC):
    """Where images lie. Rows number all images of the source, usable or not.

    place: as the user named it. labels (n,) int64: -1 without a class. class_names: empty where classes are numbers.
    """

    place: str
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]

    @final
    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def key(self, row: int) -> str:
        """What the image is called; unique."""

    @abstractmethod
    def decoded(self, row: int) -> Image.Image | None:
        """The image, upright and RGB. None for one that cannot be used and is left out; `failures` then says why.

        Raises EvalError where an image that was there when it was listed is gone or damaged now.
        """

    @abstractmethod
    def digests(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(len(rows), 16) BLAKE2b-128 of the image files; 0 where a file cannot be read."""

    @property
    def failures(self) -> dict[int, str]:
        """Rows that turned out to be unusable while they were read, and why."""
        return {}

    @property
    def notes(self) -> list[str]:
        """What a reader of figures must know about how the images were read, one sentence each."""
        return []


@final
class CacheImages(ImageSource):
    """The images of a cache, read from where the build found them; those that are gone, from the pixels that it keeps.

    Unusable ones are known beforehand.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache, self.place = cache, cache.url
        self.labels, self.class_names = cache.index.labels.astype(np.int64), cache.meta.class_names
        self._kept_instead = set[int]()

    def key(self, row: int) -> str:
        return self.cache.index.key(row)

    def decoded(self, row: int) -> Image.Image:
        try:
            file, kept = self.cache.read_original_or_kept(row)
            if kept:
                self._kept_instead.add(row)
            return self.cache.decode(file)
        except ImageError as exc:
            cure = "bring the files back to where they were, or name other images" if self.cache.pixels is None else ""
            raise EvalError(f"image {self.key(row)} of {self.place}: {exc}" + (f"; {cure}" if cure else "")) from exc

    def digests(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self.cache.digests[rows]

    @property
    def notes(self) -> list[str]:
        store, web = self.cache.meta.pixels, self.cache.web_note()
        if not self._kept_instead or store is None:
            return [f"{web[0].upper()}{web[1:]}."] if web else []
        return [
            f"{len(self._kept_instead):,} image files of {self.place} are gone or changed: the pixels that the cache keeps "
            f"({store}) were used for them."
        ]


@final
class ListedImages(ImageSource):
    """The images of a folder tree (the first folder is the class), of tars (`.cls` is the class), or of a pattern of tars.

    Files that cannot be decoded are left out when they are met: looking at all of them beforehand would take as long
    as the evaluation of a small model. Raises SourceError as `list_images` does.
    """

    def __init__(self, place: str, *, max_pixels: int = MAX_PIXELS) -> None:
        listing = list_images([place])
        self.place, self.class_names = place, listing.class_names
        self.labels = listing.index.labels.astype(np.int64)
        self._notes = list(listing.notes)
        self._index, self._containers, self._max_pixels = listing.index, listing.containers, max_pixels
        self._digests = np.zeros((len(self.labels), _DIGEST_BYTES), np.uint8)
        self._seen = np.zeros(len(self.labels), np.bool_)
        self._failures: dict[int, str] = {}

    def key(self, row: int) -> str:
        return self._index.key(row)

    def decoded(self, row: int) -> Image.Image | None:
        try:
            data = self._read(row)
            return decode_image(data, max_pixels=self._max_pixels)
        except ImageError as exc:
            self._failures[row] = str(exc)
            return None

    def digests(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        for row in rows[~self._seen[rows]]:
            with contextlib.suppress(ImageError):  # whoever decodes it hears of it
                self._read(int(row))
        return self._digests[rows]

    @property
    def failures(self) -> dict[int, str]:
        return self._failures

    @property
    def notes(self) -> list[str]:
        return self._notes

    def _read(self, row: int) -> bytes:
        index = self._index
        container = self._containers[index.container[row]]
        data = read_image(container, index.key(row), int(index.offset[row]), int(index.length[row]))
        self._digests[row] = np.frombuffer(digest(data), np.uint8)
        self._seen[row] = True
        return data


@dataclass(frozen=True)
class ImageSet:
    """Some rows (n,) of a source, ascending, and their classes (n,), -1 for none. Positions count these rows.

    class_names is empty where classes are mere numbers.
    """

    source: ImageSource
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def place(self) -> str:
        return self.source.place

    @property
    def cache(self) -> Cache | None:
        """The cache the images are of, if they are of one."""
        return self.source.cache if isinstance(self.source, CacheImages) else None

    def key(self, position: int) -> str:
        return self.source.key(int(self.rows[position]))

    def decoded(self, position: int) -> Image.Image | None:
        """The image, upright and RGB; None if it is left out. Raises EvalError as `ImageSource.decoded` does."""
        return self.source.decoded(int(self.rows[position]))

    def name_of(self, label: int) -> str:
        return self.class_names[label] if 0 <= label < len(self.class_names) else f"class {label}"

    def at(self, positions: NDArray[np.int64]) -> "ImageSet":
        """Only these."""
        return replace(self, rows=self.rows[positions], labels=self.labels[positions])

    def sampled(self, limit: int | None, seed: int) -> "ImageSet":
        """At most `limit` of these, drawn at random, so that images sorted by class still give all classes."""
        if limit is None or limit >= len(self):
            return self
        return self.at(np.sort(np.random.default_rng(seed).choice(len(self), limit, replace=False)))

    def usable(self) -> "ImageSet":
        """Without the images that turned out to be unusable while they were read."""
        failures = self.source.failures
        return self if not failures else self.at(np.flatnonzero([row not in failures for row in self.rows.tolist()]))

    def identity(self) -> dict[str, str | int]:
        """Where these images are, how many, and one hash over the hashes of their files, for the record."""
        digests = self.source.digests(self.rows)
        return {
            "place": self.place,
            "images": len(self.rows),
            "images_in_place": len(self.source),
            "sha256_of_image_digests": hashlib.sha256(digests.tobytes()).hexdigest(),
        }

    def copies(self) -> int:
        """Images whose file occurs more than once among these, beyond the first."""
        return len(self.rows) - len(_digest_set(self))

    def shared_with(self, other: "ImageSet") -> int:
        """Images whose very file is among the others too."""
        theirs = _digest_set(other)
        return sum(digest.tobytes() in theirs for digest in self.source.digests(self.rows))


def open_source(place: str | Path) -> ImageSource:
    """The images at a place: a cache, a folder, a tar, a folder or a pattern of tars (`train-{000..004}.tar`)."""
    # Whether a cache is there is asked of what can be one: a pattern of tars is no path at all.
    if is_url(place) or Path(place).suffix == ".zarr" or (Path(place) / "zarr.json").exists():
        return CacheImages(Cache(place))
    return ListedImages(str(place))


def image_set(
    source: ImageSource,
    *,
    teachers: Iterable[str] = (),
    labelled: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> ImageSet:
    """The images of a source that are usable and, in a cache, whose features every teacher named has.

    labelled: only those with a class. limit: at most this many, drawn at random, so that images sorted by
    class still give all classes. Raises EvalError if none is left, saying what is missing.
    """
    rows = np.arange(len(source))
    if isinstance(source, CacheImages):
        teachers = tuple(teachers)
        rows = source.cache.usable_rows(teachers)
        if len(rows) == 0:
            raise EvalError(
                f"{source.place} has no finished images"
                + (f" for {', '.join(teachers)}" if teachers else "")
                + f" ({len(source)} are listed): run the build again"
            )
    if labelled:
        rows = rows[source.labels[rows] >= 0]
        if len(rows) == 0:
            cure = "build it from" if isinstance(source, CacheImages) else "this takes"
            raise EvalError(
                f"{source.place} has no labels, which are needed here: {cure} a folder with one subfolder per class, or "
                "tars with a .cls for each image"
            )
    return ImageSet(source, rows, source.labels[rows], source.class_names).sampled(limit, seed)


def in_classes_of(bank: ImageSet, queries: ImageSet) -> ImageSet:
    """The queries with the bank's class numbers: classes are the same when their names are.

    Raises EvalError if the queries have classes that the bank does not know, or only one of the two has names.
    """
    here, there = queries.place, bank.place
    if bool(bank.class_names) != bool(queries.class_names):
        named, numbered = (there, here) if bank.class_names else (here, there)
        raise EvalError(f"{named} names its classes and {numbered} only numbers them: they cannot be matched")
    if not bank.class_names:
        return queries
    number_of = {name: number for number, name in enumerate(bank.class_names)}
    names = [queries.class_names[label] for label in np.unique(queries.labels)]
    unknown = [name for name in names if name not in number_of]
    if unknown:
        listed = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise EvalError(
            f"{len(unknown)} of the {len(names)} classes of {here} are not classes of {there} ({listed}): "
            "bank and queries need the same class names"
        )
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
