"""Progress of an encoder over images."""

from typing import final

from evals.encoders.base import Encoder
from evals.shared.progress import Progress


@final
class CountedImages:
    """Adds up the images of one encoder for its progress line; silent for an encoder that runs no model."""

    def __init__(self, encoder: Encoder, total: int, progress: Progress | None) -> None:
        self._name, self._total, self._num_done = encoder.name, total, 0
        self._progress = progress if encoder.runs_a_model else None
        self(0)  # the line appears before the first batch, which may take long

    def __call__(self, count: int) -> None:
        """Report `count` more images."""
        self._num_done += count
        if self._progress is not None:
            self._progress(self._name, self._num_done, self._total)
