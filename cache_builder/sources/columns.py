"""The images of one source as columns, and the operations that combine the columns of several sources."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import SourceError

_MAX_LISTED_EXTENSIONS = 6

_PHOTO_EXTENSIONS = frozenset(
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
"""Extensions of photos that cannot be decoded. They come first in a note on skipped files, because users miss them."""


@dataclass(frozen=True, kw_only=True)
class SourceImages:
    """The images of one folder, tar, Parquet file or list, in its own order."""

    members: list[str]
    """Keys of the images without the prefix of their container."""

    labels: NDArray[np.int32]
    """(n,) class numbers, -1 for an image without a class."""

    class_names: tuple[str, ...] | None
    """Names of the class numbers, None where the source has numbers only."""

    offset: NDArray[np.int64]
    """(n,) as in `ImageIndex`."""

    length: NDArray[np.int64]
    """(n,) as in `ImageIndex`."""

    notes: tuple[str, ...] = ()
    """Messages for the user, without the name of the source."""

    column: str = ""
    """Column of a Parquet file that holds the images, as in `Container`."""

    text_labels: bool = False
    """True if class numbers were written as text. They count as names where another source has names."""

    kind: Literal["list"] | None = None
    """Kind of the container where it differs from the source's, as for a Parquet file that lists files."""


@dataclass
class SkippedFiles:
    """A count of files without the name of an image, by extension, with an example."""

    count: int = 0
    example: str = ""
    _extensions: Counter[str] = field(default_factory=Counter[str])
    _is_photo: bool = False

    def add(self, name: str) -> None:
        """Count one file.

        Args:
            name: path of the file below its source.
        """
        self.count += 1
        base = name[name.rfind("/") + 1 :]
        # The dot of a hidden file (".bashrc") begins no extension.
        extension = base[base.rfind(".") :].lower() if "." in base[1:] else ""
        self._extensions[extension] += 1
        is_photo = extension in _PHOTO_EXTENSIONS
        # The first file is the example, until a photo comes: its absence from the cache matters most.
        if not self.example or (is_photo and not self._is_photo):
            self.example, self._is_photo = name, is_photo

    @property
    def note(self) -> str:
        """A message with the number of files, their extensions and an example."""
        by_count = sorted(
            self._extensions.items(), key=lambda item: (item[0] not in _PHOTO_EXTENSIONS, -item[1], item[0])
        )
        listed = [f"{count} {extension or 'without an extension'}" for extension, count in by_count]
        num_hidden = len(listed) - _MAX_LISTED_EXTENSIONS
        if num_hidden > 0:
            listed[_MAX_LISTED_EXTENSIONS:] = [f"{num_hidden} more extensions"]
        return f"{counted(self.count, 'file')} skipped (no image by name): {', '.join(listed)}, such as {self.example}"


def counted(count: int, noun: str) -> str:
    """Return the count followed by the noun, in the plural unless the count is 1."""
    return f"{count} {noun}{'s' if count != 1 else ''}"


def nowhere(count: int) -> NDArray[np.int64]:
    """Return `count` offsets or lengths of images that are files of their own: all -1."""
    return np.full(count, -1, np.int64)


def numbered(names: Sequence[str | None]) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Return class names as numbers, and the sorted names that the numbers index; -1 stands for None."""
    class_names = tuple(sorted({name for name in names if name is not None}))
    number: dict[str | None, int] = {name: position for position, name in enumerate(class_names)}
    number[None] = -1
    return np.fromiter((number[name] for name in names), np.int32, len(names)), class_names


def unique_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names with every repeated one numbered ("a.jpg#2"), and a note if any name repeats."""
    # The suffix depends on the order alone, so listing the same tar again gives the same keys.
    occurrences: Counter[str] = Counter()
    unique: list[str] = []
    for name in names:
        occurrences[name] += 1
        unique.append(name if occurrences[name] == 1 else f"{name}#{occurrences[name]}")
    num_repeated = len(names) - len(occurrences)
    if not num_repeated:
        return unique, []
    return unique, [f"{counted(num_repeated, 'duplicate image name')}; later ones are stored as name#2"]


def joined_labels(sources: Sequence[SourceImages]) -> tuple[NDArray[np.int32], tuple[str, ...] | None]:
    """Concatenate the labels of several sources.

    Returns:
        Class numbers of all images in order, and the names that they index; None if no source has names.

    Raises:
        SourceError: some sources have class names and others have class numbers only.
    """
    labelled = [source for source in sources if (source.labels >= 0).any()]
    named = [source for source in labelled if source.class_names is not None]
    labels = np.concatenate([source.labels for source in sources]) if sources else np.zeros(0, np.int32)
    if not named:
        return labels, None
    # Numbers that were text ("12" in a CSV file) become names as soon as another source has names.
    sources = [
        _with_names(source) if source.class_names is None and source.text_labels else source for source in sources
    ]
    labelled = [source for source in sources if (source.labels >= 0).any()]
    named = [source for source in labelled if source.class_names is not None]
    # Which number a name would have among numbers cannot be known.
    if len(named) < len(labelled):
        raise SourceError(
            "some images have class names (class folders) and others have class numbers (such as .cls files): build two caches "
            "instead"
        )
    if len({source.class_names for source in named}) == 1:
        return labels, named[0].class_names
    # Sources with different classes: number the union of their names, then translate each source's numbers.
    names = tuple(sorted({name for source in named for name in source.class_names or ()}))
    number = {name: position for position, name in enumerate(names)}
    translated: list[NDArray[np.int32]] = []
    for source in sources:
        # Label -1 indexes the last entry of the table.
        table = np.array([*(number[name] for name in source.class_names or ()), -1], np.int32)
        translated.append(table[source.labels])
    return np.concatenate(translated), names


def _with_names(source: SourceImages) -> SourceImages:
    """Return the source with its class numbers, as text, for class names."""
    labels, names = numbered([None if label < 0 else str(label) for label in source.labels.tolist()])
    return replace(source, labels=labels, class_names=names)


def without_empty_classes(
    labels: NDArray[np.int32], names: tuple[str, ...]
) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Return class numbers and names without the classes that have no image."""
    used = np.unique(labels[labels >= 0])
    # One entry more than classes: label -1 indexes the last one and stays -1.
    table = np.full(len(names) + 1, -1, np.int32)
    table[used] = np.arange(len(used), dtype=np.int32)
    return table[labels], tuple(names[number] for number in used.tolist())


FEW_NUMBERS = 1 << 20
"""Class numbers below this are kept unchanged. Evaluation and training allocate by the largest number."""


def sparse_numbers_named(labels: NDArray[np.int32]) -> tuple[NDArray[np.int32], tuple[str, ...] | None]:
    """Renumber the classes as 0, 1, ... if their numbers are large and sparse, such as identifiers of products or of WordNet.

    Counting by class needs memory for every number up to the largest.

    Args:
        labels: (n,) class numbers, -1 for an image without a class.

    Returns:
        The class numbers, and the original numbers as class names; None for names if the numbers are unchanged.
    """
    largest = int(labels.max(initial=-1))
    if largest < max(FEW_NUMBERS, 4 * len(labels)):
        return labels, None
    used, dense = np.unique(labels, return_inverse=True)
    num_unlabelled = int(used[0] < 0)  # np.unique sorts: -1, if present, is number 0
    return (dense - num_unlabelled).astype(np.int32), tuple(str(number) for number in used[num_unlabelled:].tolist())
