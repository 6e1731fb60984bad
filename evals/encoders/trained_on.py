"""Images that a student was trained on, and those held out: an accuracy on the former measures memory as much as features."""

from collections.abc import Iterable

import numpy as np

from evals.encoders.base import Encoder
from evals.encoders.student import StudentEncoder
from evals.shared.image_set import ImageSet
from radio_cache.errors import RadioCacheError
from radio_cache.reader import is_cache
from trainer import StudentConfig
from trainer.data.holdout import ImagesOfRun
from trainer.model.image_split import ImageSplit


def count_trained_on(student: StudentConfig, images: ImageSet) -> int | None:
    """Count the images whose very file the student was trained on; None where its cache is not there to ask."""
    if not is_cache(student.cache):
        return None
    try:
        of_run = ImagesOfRun(student)
    except RadioCacheError:  # replaced, damaged, or without these teachers: it cannot answer any more
        return None
    return int(of_run.trained_on(images.source.digests(images.rows)).sum())


def memory_note(name: str, count: int, total: int) -> str:
    """Return the sentence that stands below a table whose images the student was trained on."""
    which = "all" if count == total else f"{count:,} of the {total:,}"
    return (
        f"{name} was trained on {which} images that are classified here, which makes it look better than on new ones: "
        "give --queries that it has never seen, or train with --holdout 0.1."
    )


def split_of(encoders: Iterable[Encoder]) -> ImageSplit | None:
    """Return how the first student with held-out images divided its cache; None where none has any."""
    splits = (encoder.config.images for encoder in encoders if isinstance(encoder, StudentEncoder))
    return next((split for split in splits if split is not None and split.held_out), None)


def divided(images: ImageSet, split: ImageSplit | None) -> tuple[ImageSet, ImageSet] | None:
    """Divide images of a cache into those that the rule leaves for training and those it holds out.

    Returns:
        The two sets; None without a rule, for images of no cache, and where one of the sets would be empty.
    """
    if split is None or images.cache is None:
        return None
    held_out = split.is_held_out(images.source.digests(images.rows))
    if held_out.all() or not held_out.any():
        return None
    return images.at(np.flatnonzero(~held_out)), images.at(np.flatnonzero(held_out))


def held_out_of(images: ImageSet, encoders: Iterable[Encoder]) -> tuple[ImageSet, list[str]]:
    """Return the images that the first student was not trained on, where a cache holds both kinds, and a note about it."""
    parts = divided(images, split_of(encoders))
    if parts is None:
        return images, []
    return parts[1], [f"Evaluated on the {len(parts[1]):,} images of {images.place} that were held out of training."]
