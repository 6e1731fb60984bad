"""Sentences that a reader of a table needs in order to believe it, and that several evaluations share."""

import numpy as np

from evals.shared.image_set import ImageSet

_ENOUGH_IMAGES = 2500
"""From here on sampling error is below two points, and a table goes without the reminder."""


def counted(number: int, one: str, many: str) -> str:
    """A number with the right word behind it."""
    return f"{number:,} {one if number == 1 else many}"


def sampling_note(tested: int) -> list[str]:
    """How far an accuracy over so many images may be off by chance, where that is worth saying."""
    if tested >= _ENOUGH_IMAGES:
        return []
    # Two standard errors of a share of one half, the widest there is.
    return [f"{tested:,} images tested: an accuracy is known to about ±{100 / np.sqrt(tested):.0f} points."]


def left_out_notes(images: ImageSet) -> list[str]:
    """Sentences about images that could not be read, or not from where they were, if there are any."""
    rows = set(images.rows.tolist())
    failed = {row: reason for row, reason in images.source.failures.items() if row in rows}
    if not failed:
        return images.source.notes
    listed = "; ".join(f"{images.source.key(row)}: {failed[row]}" for row in sorted(failed)[:3])
    more = "; ..." if len(failed) > 3 else ""
    return [
        f"{counted(len(failed), 'image', 'images')} of {images.place} could not be read and "
        f"{'is' if len(failed) == 1 else 'are'} left out ({listed}{more}).",
        *images.source.notes,
    ]
