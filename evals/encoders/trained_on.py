"""Images that a student was trained on, and held-out ones: accuracy on the former measures memory as much as features."""

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
    """Count the images whose very file the student was trained on; None if its cache is no longer available."""
    if not is_cache(student.cache):
        return None
    try:
        images_of_run = ImagesOfRun(student)
    except RadioCacheError:  # replaced, damaged, or without these teachers: its images are unknown
        return None
    # By the hash of the file, so that a copy of an image in another folder is recognised.
    return int(images_of_run.trained_on(images.source.digests(images.rows)).sum())


def memory_note(name: str, count: int, total: int) -> str:
    """Return the note below a table whose images the student was trained on."""
    share = "all" if count == total else f"{count:,} of the {total:,}"
    return (
        f"{name} was trained on {share} images that are classified here, which makes it look better than on new ones: "
        "give --queries that it has never seen, or train with --holdout 0.1."
    )


def split_of(encoders: Iterable[Encoder]) -> ImageSplit | None:
    """Return the split of the first student with held-out images; None if no student has any."""
    splits = (encoder.config.images for encoder in encoders if isinstance(encoder, StudentEncoder))
    # Runs compared in one table share their cache as a rule, so the first split stands for all.
    return next((split for split in splits if split is not None and split.held_out), None)


def divided(images: ImageSet, split: ImageSplit | None) -> tuple[ImageSet, ImageSet] | None:
    """Divide images of a cache into training images and held-out images by the rule of a split.

    Args:
        images: of a cache.
        split: the rule, see `split_of`.

    Returns:
        The two sets; None without a split, for images of no cache, and if one of the sets would be empty.
    """
    if split is None or images.cache is None:
        return None
    # The rule hashes files, so it holds for a cache that grew, or was moved, since the training.
    held_out = split.is_held_out(images.source.digests(images.rows))
    # A cache of other images may fall on one side of the rule entirely: then it is no split.
    if held_out.all() or not held_out.any():
        return None
    return images.at(np.flatnonzero(~held_out)), images.at(np.flatnonzero(held_out))


def held_out_of(images: ImageSet, encoders: Iterable[Encoder]) -> tuple[ImageSet, list[str]]:
    """Return the held-out images of a cache with a note, or all images if the first student has no held-out ones there."""
    training_and_held_out = divided(images, split_of(encoders))
    if training_and_held_out is None:
        return images, []
    held_out = training_and_held_out[1]
    return held_out, [f"Evaluated on the {len(held_out):,} images of {images.location} that were held out of training."]
