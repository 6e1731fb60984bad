"""How evaluations say how far they are, without knowing who listens."""

from typing import Protocol, final

from evals.encoders.base import Encoder


class Progress(Protocol):
    """Told what is going on, how much of it is done, and how much there is in all. unit: what is counted."""

    def __call__(self, name: str, done: int, total: int, /, *, unit: str = "images") -> None: ...


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
