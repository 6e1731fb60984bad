"""Progress of an encoder over images."""

from typing import final

from evals.encoders.base import Encoder
from evals.shared.progress import Progress


@final
class CountedImages:
    """Adds up what an encoder says it has done, for the progress line of its name; says nothing for one that runs no model."""

    def __init__(self, encoder: Encoder, total: int, progress: Progress | None) -> None:
        self._name, self._total, self._done = encoder.name, total, 0
        self._progress = progress if encoder.runs_a_model else None
        self(0)

    def __call__(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._name, self._done, self._total)
