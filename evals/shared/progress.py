"""How evaluations say how far they are, without knowing who listens."""

from typing import Protocol


class Progress(Protocol):
    """Told what is going on, how much of it is done, and how much there is in all. unit: what is counted."""

    def __call__(self, name: str, done: int, total: int, /, *, unit: str = "images") -> None: ...
