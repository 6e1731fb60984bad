"""What one source of images holds, as columns."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import SourceError

_TOLD_ENDINGS = 6

_PHOTO_ENDINGS = frozenset(
    {
        ".heic",
        ".heif",
        ".jxl",
        ".jp2",
        ".cr2",
        ".cr3",
        ".nef",
        ".arw",
        ".dng",
        ".orf",
        ".raf",
        ".rw2",
        ".raw",
        ".psd",
        ".svg",
    }
)
"""Photos that nothing here decodes; named first among what is passed over, because they are missed."""


@dataclass(frozen=True, kw_only=True)
class SourceImages:
    """The images of one folder, tar, Parquet file or list, in its own order.

    members: what follows the container's prefix in the keys. labels (n,) int32: class numbers, -1 without one.
    class_names: what the numbers mean; None where they are only numbers. text_labels: these were written as text, and are names
    where another source has names.
    offset, length (n,) int64: as in `ImageIndex`. notes: sentences for the user, who knows already which source it is.
    column: of a Parquet file, as in `Container`. kind: of the container, where it is not that of the source: a Parquet file
    that lists files.
    """

    members: list[str]
    labels: NDArray[np.int32]
    class_names: tuple[str, ...] | None
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    notes: tuple[str, ...] = ()
    column: str = ""
    text_labels: bool = False
    kind: Literal["list"] | None = None


@dataclass
class SkippedFiles:
    """Counts files that are no images by name. Photos in formats that nothing here decodes are among them."""

    count: int = 0
    example: str = ""
    _endings: Counter[str] = field(default_factory=Counter[str])
    _is_photo: bool = False

    def add(self, name: str) -> None:
        self.count += 1
        base = name[name.rfind("/") + 1 :]
        ending = base[base.rfind(".") :].lower() if "." in base[1:] else ""
        self._endings[ending] += 1
        photo = ending in _PHOTO_ENDINGS
        if not self.example or (photo and not self._is_photo):
            self.example, self._is_photo = name, photo

    @property
    def note(self) -> str:
        """A sentence that says how many, of which endings, with an example."""
        endings = sorted(self._endings.items(), key=lambda one: (one[0] not in _PHOTO_ENDINGS, -one[1], one[0]))
        first = [f"{count} {ending or 'without an ending'}" for ending, count in endings[:_TOLD_ENDINGS]]
        more = [f"{len(endings) - _TOLD_ENDINGS} more endings"] if len(endings) > _TOLD_ENDINGS else []
        return f"{counted(self.count, 'file')} passed over (no image by name): {', '.join(first + more)}, such as {self.example}"


def counted(count: int, noun: str) -> str:
    """Return the count and the noun, in the plural where that is due."""
    return f"{count} {noun}{'s' if count != 1 else ''}"


def nowhere(count: int) -> NDArray[np.int64]:
    """Offsets or lengths of images that are files of their own."""
    return np.full(count, -1, np.int64)


def numbered(names: Sequence[str | None]) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Class names as numbers into their sorted list; -1 for None."""
    known = tuple(sorted({name for name in names if name is not None}))
    number: dict[str | None, int] = {name: position for position, name in enumerate(known)}
    number[None] = -1
    return np.fromiter((number[name] for name in names), np.int32, len(names)), known


def unique_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names, later ones of a kind numbered ("a.jpg#2"), and a note if there are such."""
    count: Counter[str] = Counter()
    unique: list[str] = []
    for name in names:
        count[name] += 1
        unique.append(name if count[name] == 1 else f"{name}#{count[name]}")
    repeated = len(names) - len(count)
    if not repeated:
        return unique, []
    return unique, [f"{repeated} image name{'s' if repeated > 1 else ''} came twice; the later ones are called name#2"]


def joined_labels(found: Sequence[SourceImages]) -> tuple[NDArray[np.int32], tuple[str, ...] | None]:
    """The labels of several sources together: numbers, and what they mean.

    Raises SourceError if some have names and others numbers alone.
    """
    labelled = [one for one in found if (one.labels >= 0).any()]
    named = [one for one in labelled if one.class_names is not None]
    labels = np.concatenate([one.labels for one in found]) if found else np.zeros(0, np.int32)
    if not named:
        return labels, None
    found = [_with_names(one) if one.class_names is None and one.text_labels else one for one in found]
    labelled = [one for one in found if (one.labels >= 0).any()]
    named = [one for one in labelled if one.class_names is not None]
    if len(named) < len(labelled):
        raise SourceError(
            "some images have class names (class folders) and others have class numbers (such as .cls files): build two caches "
            "instead"
        )
    if len({one.class_names for one in named}) == 1:
        return labels, named[0].class_names
    names = tuple(sorted({name for one in named for name in one.class_names or ()}))
    number = {name: position for position, name in enumerate(names)}
    parts: list[NDArray[np.int32]] = []
    for one in found:
        # The last entry is where -1 points.
        table = np.array([*(number[name] for name in one.class_names or ()), -1], np.int32)
        parts.append(table[one.labels])
    return np.concatenate(parts), names


def _with_names(found: SourceImages) -> SourceImages:
    """The source with its class numbers for names."""
    labels, names = numbered([None if label < 0 else str(label) for label in found.labels.tolist()])
    return replace(found, labels=labels, class_names=names)


def without_empty_classes(
    labels: NDArray[np.int32], names: tuple[str, ...]
) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Numbers and names of the classes that still have an image."""
    used = np.unique(labels[labels >= 0])
    table = np.full(len(names) + 1, -1, np.int32)
    table[used] = np.arange(len(used), dtype=np.int32)
    return table[labels], tuple(names[number] for number in used.tolist())


FEW_NUMBERS = 1 << 20
"""Class numbers below are kept as they are; evals and training count by the largest."""


def sparse_numbers_named(labels: NDArray[np.int32]) -> tuple[NDArray[np.int32], tuple[str, ...] | None]:
    """Class numbers as 0, 1, ... in their order, with the numbers themselves as names, where they are identifiers (of products,
    of WordNet); else as they are, with None.

    Whoever counts by class would need memory for every number up to the largest.
    """
    largest = int(labels.max(initial=-1))
    if largest < max(FEW_NUMBERS, 4 * len(labels)):
        return labels, None
    used, dense = np.unique(labels, return_inverse=True)
    without = int(used[0] < 0)  # images without a class come first
    return (dense - without).astype(np.int32), tuple(str(number) for number in used[without:].tolist())
