"""Where a build's time goes, by stage: the progress line names the one that holds the others up."""

import time
from dataclasses import dataclass


@dataclass
class StageSeconds:
    """Where the main thread's time went; the larger of decode and write names the stage that holds the teacher up."""

    decode: float = 0.0
    teacher: float = 0.0
    encode: float = 0.0
    write: float = 0.0

    def bottleneck(self) -> str:
        """The stage that takes the most of the time, in words for the progress line."""
        stages = {
            "teacher": self.teacher,
            "encoding": self.encode,
            "waiting for images": self.decode,
            "waiting for the disk": self.write,
        }
        total = sum(stages.values())
        name = max(stages, key=lambda stage: stages[stage])
        return f"{name} {stages[name] / total:.0%}" if total > 0 else ""


class Stopwatch:
    """Adds the time a block takes to one field of StageSeconds."""

    def __init__(self, seconds: StageSeconds, stage: str) -> None:
        self._seconds, self._stage, self._started = seconds, stage, 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self._started
        setattr(self._seconds, self._stage, getattr(self._seconds, self._stage) + spent)
