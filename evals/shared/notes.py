"""Notes below a table that several evaluations share: sampling error, images that were left out."""

import numpy as np

from evals.shared.image_set import ImageSet

_ENOUGH_IMAGES = 2500
"""From this many images on, the sampling error is below two points and needs no note."""


def counted(number: int, singular: str, plural: str) -> str:
    """Return the number followed by the word in its singular or plural form."""
    return f"{number:,} {singular if number == 1 else plural}"


def sampling_note(num_images: int) -> list[str]:
    """Return a note on the sampling error of an accuracy over this many images; nothing where the error is small."""
    if num_images >= _ENOUGH_IMAGES:
        return []
    # Two standard errors of a share of one half, the widest there is.
    return [f"{num_images:,} images tested: an accuracy is known to about ±{100 / np.sqrt(num_images):.0f} points."]


def left_out_notes(images: ImageSet) -> list[str]:
    """Return notes about images that could not be read, and those of the source."""
    rows = set(images.rows.tolist())  # a source may hold failures of another set, the bank's beside the queries'
    failed = {row: reason for row, reason in images.source.failures.items() if row in rows}
    if not failed:
        return images.source.notes
    # Three examples show the kind of failure; a list of all could be endless.
    listed = "; ".join(f"{images.source.key(row)}: {failed[row]}" for row in sorted(failed)[:3])
    more = "; ..." if len(failed) > 3 else ""
    return [
        f"{counted(len(failed), 'image', 'images')} of {images.location} could not be read and "
        f"{'is' if len(failed) == 1 else 'are'} left out ({listed}{more}).",
        *images.source.notes,
    ]
