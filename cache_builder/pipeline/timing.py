"""Seconds of a build by stage: the progress line names the stage that holds the others up."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields


@dataclass
class StageSeconds:
    """Seconds by stage.

    decode, teacher, encode and write (compression included) are summed over the threads that do the work. The three
    waits are of the thread that hands work on: for decoded images, for results of the device, for the writer. On a GPU
    `teacher` is the time to enqueue the kernels, and `encode` includes the wait for them.
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
        """Return stage -> seconds so far."""
        with self.lock:
            return {stage.name: getattr(self, stage.name) for stage in fields(self) if stage.name != "lock"}

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add seconds by stage, such as those of another process."""
        with self.lock:
            for name, spent_s in seconds.items():
                setattr(self, name, getattr(self, name) + spent_s)

    def bottleneck(self) -> str:
        """Return the stage that the pipeline waits for most, and its share of all waiting, such as "teacher 48%"."""
        waits = {
            "encoding" if self.encode > self.teacher else "teacher": self.wait_device,
            "waiting for images": self.wait_decode,
            "waiting for the disk": self.wait_write,
        }
        total = sum(waits.values())
        name = max(waits, key=lambda stage: waits[stage])
        return f"{name} {waits[name] / total:.0%}" if total > 0 else ""


class Stopwatch:
    """A context that adds its duration to one field of a StageSeconds, from any thread."""

    def __init__(self, seconds: StageSeconds, stage: str) -> None:
        self._seconds, self._stage, self._started_s = seconds, stage, 0.0

    def __enter__(self) -> None:
        self._started_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds.add({self._stage: time.perf_counter() - self._started_s})


class DeviceWait(Stopwatch):
    """A stopwatch of `wait_device` that leaves out the time in which decoded images were waited for."""

    def __init__(self, seconds: StageSeconds) -> None:
        super().__init__(seconds, "wait_device")
        self._decode_waited_s = 0.0

    def __enter__(self) -> None:
        self._decode_waited_s = self._seconds.wait_decode
        super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        # The thread that takes results also feeds the device, so it may have waited for images meanwhile.
        self._seconds.add({"wait_device": self._decode_waited_s - self._seconds.wait_decode})
