"""The default length of a training run, for `radio-train` and for the estimates of `radio-cache plan`."""

from dataclasses import dataclass

_EPOCHS, _LEAST_CROPS = 30, 25_600
_MANY_IMAGES = 50_000


@dataclass(frozen=True)
class UsualRun:
    """Steps of a student's training, and images in each."""

    steps: int
    batch_images: int

    @property
    def crops(self) -> int:
        """Images that the student sees, and that its teachers would have to."""
        return self.steps * self.batch_images


def usual_run(num_images: int, device: str, *, steps: int | None = None, batch_images: int | None = None) -> UsualRun:
    """Return thirty epochs of crops or 25,600, whichever is more, in batches that fit the device.

    Args: steps, batch_images: where the user decides them, the other follows.
    """
    # A small data set in large batches would give too few optimiser steps.
    usual = 64 if device == "cpu" or num_images < _MANY_IMAGES else 256
    batch = batch_images or max(1, min(usual, num_images))
    # Rounded up, so that the crops are at least as many as documented.
    return UsualRun(steps or -(-max(_LEAST_CROPS, _EPOCHS * num_images) // max(1, batch)), batch)


__all__ = ["UsualRun", "usual_run"]
