"""What one source of images holds, as columns."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import SourceError


@dataclass(frozen=True, kw_only=True)
class Found:
    """The images of one folder, tar, Parquet file or list, in its own order.

    members: what follows the container's prefix in the keys. labels (n,) int32: class numbers, -1 without one.
    class_names: what the numbers mean; None where they are only numbers.
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
    kind: Literal["list"] | None = None


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


def joined_labels(found: Sequence[Found]) -> tuple[NDArray[np.int32], tuple[str, ...] | None]:
    """The labels of several sources together: numbers, and what they mean.

    Raises SourceError if some have names and others numbers alone.
    """
    labelled = [one for one in found if (one.labels >= 0).any()]
    named = [one for one in labelled if one.class_names is not None]
    labels = np.concatenate([one.labels for one in found]) if found else np.zeros(0, np.int32)
    if not named:
        return labels, None
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


def without_empty_classes(
    labels: NDArray[np.int32], names: tuple[str, ...]
) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Numbers and names of the classes that still have an image."""
    used = np.unique(labels[labels >= 0])
    table = np.full(len(names) + 1, -1, np.int32)
    table[used] = np.arange(len(used), dtype=np.int32)
    return table[labels], tuple(names[number] for number in used.tolist())
