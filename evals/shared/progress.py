"""The callback by which evaluations report progress."""

from typing import Protocol


class Progress(Protocol):
    """Called with the name of the task, the number done, the total, and the unit that is counted."""

    def __call__(self, name: str, num_done: int, total: int, /, *, unit: str = "images") -> None:
        """Report `num_done` of `total` units of the task `name`."""
        ...
