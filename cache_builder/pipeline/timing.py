"""Where a build's time goes, by stage: the progress line names the one that holds the others up."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields


@dataclass
class StageSeconds:
    """Seconds that threads worked, summed over them: decode, teacher, encode, write (compression included).

    And seconds that the thread which hands work on waited, for want of decoded images, of results, of the writer. On a GPU
    `teacher` is the time it takes to tell the device what to do, and `encode` that and the wait for it.
    """

    decode: float = 0.0
    teacher: float = 0.0
    encode: float = 0.0
    write: float = 0.0
    wait_decode: float = 0.0
    wait_device: float = 0.0
    wait_write: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def to_json(self) -> dict[str, float]:
        """Stage -> seconds so far."""
        with self.lock:
            return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "lock"}

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add what was spent elsewhere, stage by stage."""
        with self.lock:
            for name, spent in seconds.items():
                setattr(self, name, getattr(self, name) + spent)

    def bottleneck(self) -> str:
        """What the pipeline waits for most, and how much of its waiting that is, in words for the progress line."""
        waits = {
            "encoding" if self.encode > self.teacher else "teacher": self.wait_device,
            "waiting for images": self.wait_decode,
            "waiting for the disk": self.wait_write,
        }
        total = sum(waits.values())
        name = max(waits, key=lambda stage: waits[stage])
        return f"{name} {waits[name] / total:.0%}" if total > 0 else ""


class Stopwatch:
    """Adds the time a block takes to one field of StageSeconds; from any thread."""

    def __init__(self, seconds: StageSeconds, stage: str) -> None:
        self._seconds, self._stage, self._started = seconds, stage, 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self._started
        with self._seconds.lock:
            setattr(self._seconds, self._stage, getattr(self._seconds, self._stage) + spent)
