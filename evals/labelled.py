"""Which images of a cache an evaluation uses, and their classes."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from evals.errors import EvalError
from radio_cache.reader import Cache


@dataclass(frozen=True)
class LabelledImages:
    """Rows (n,) of a cache, ascending, and their classes (n,). class_names is empty where classes are mere numbers."""

    cache: Cache
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def name_of(self, label: int) -> str:
        return self.class_names[label] if 0 <= label < len(self.class_names) else f"class {label}"

    def identity(self) -> dict[str, str | int]:
        """Where these images are, how many, and one hash over the hashes of their files, for the record."""
        digests = self.cache.digests[self.rows]
        return {
            "cache": self.cache.url,
            "images": len(self.rows),
            "images_in_cache": self.cache.num_images,
            "sha256_of_image_digests": hashlib.sha256(digests.tobytes()).hexdigest(),
        }

    def copies(self) -> int:
        """Images whose file occurs more than once among these, beyond the first."""
        return len(self.rows) - len(_digest_set(self))

    def shared_with(self, other: "LabelledImages") -> int:
        """Images whose very file is among the others too."""
        theirs = _digest_set(other)
        return sum(digest.tobytes() in theirs for digest in self.cache.digests[self.rows])


def labelled_images(cache: Cache, *, teachers: Iterable[str], limit: int | None = None) -> LabelledImages:
    """The images of a cache that have a label, are usable, and whose features every teacher named has.

    limit: at most this many, drawn at random with seed 0, so that a cache sorted by class still gives all classes.
    Raises EvalError if none is left, saying what is missing.
    """
    teachers = tuple(teachers)
    usable = cache.usable_rows(teachers)
    if len(usable) == 0:
        raise EvalError(
            f"{cache.url} has no finished images"
            + (f" for {', '.join(teachers)}" if teachers else "")
            + f" ({cache.num_images} are listed): run the build again"
        )
    labels = cache.index.labels[usable].astype(np.int64)
    rows = usable[labels >= 0]
    if len(rows) == 0:
        raise EvalError(
            f"{cache.url} has no labels, and k-NN classifies: build it from a folder with one subfolder per class"
        )
    if limit is not None and limit < len(rows):
        rows = np.sort(np.random.default_rng(0).choice(rows, limit, replace=False))
    return LabelledImages(cache, rows, cache.index.labels[rows].astype(np.int64), cache.meta.class_names)


def in_classes_of(bank: LabelledImages, queries: LabelledImages) -> LabelledImages:
    """The queries with the bank's class numbers: classes are the same when their names are.

    Raises EvalError if the queries have classes that the bank does not know, or only one of the two has names.
    """
    here, there = queries.cache.url, bank.cache.url
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


def _digest_set(images: LabelledImages) -> set[bytes]:
    return {digest.tobytes() for digest in images.cache.digests[images.rows]}
