"""Images that a student was trained on: an accuracy on them measures memory as much as features."""

import numpy as np
from numpy.typing import NDArray

from evals.image_set import ImageSet
from radio_cache.errors import RadioCacheError
from radio_cache.reader import Cache, is_cache
from trainer import StudentConfig


def count_trained_on(student: StudentConfig, images: ImageSet) -> int | None:
    """Count the images whose very file the student was trained on; None where its cache is not there to ask."""
    if not is_cache(student.cache):
        return None
    try:
        cache = Cache(student.cache)
        rows = cache.usable_rows([teacher.name for teacher in student.teachers])
    except RadioCacheError:  # moved, replaced or without these teachers: nobody can tell any more
        return None
    return int(np.isin(_keys(images.source.digests(images.rows)), _keys(cache.digests[rows])).sum())


def memory_note(name: str, count: int, total: int) -> str:
    """Return the sentence that stands below a table whose images the student was trained on."""
    which = "all" if count == total else f"{count:,} of the {total:,}"
    return (
        f"{name} was trained on {which} images that are classified here, which makes it look better than on new ones: "
        "give --queries that it has never seen."
    )


def _keys(digests: NDArray[np.uint8]) -> NDArray[np.void]:
    """(n, 16) bytes -> (n,) values that compare as a whole."""
    return np.ascontiguousarray(digests).view(np.dtype((np.void, digests.shape[1]))).ravel()
