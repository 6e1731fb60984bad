"""The metrics of a run: JSON lines, TensorBoard, and a progress note, as means over the steps since the last line."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, final

from radio_cache.storage.local import write_atomically
from trainer.data.waits import Waits
from trainer.monitoring.tensorboard_log import TensorBoardLog

METRICS_FILE = "metrics.jsonl"
"""Name of the log in a run's folder: one JSON object a line."""

LossSums = dict[str, list[float]]
"""Losses since the last log line, so that a resumed run logs what an uninterrupted one would have."""


class StepLosses(NamedTuple):
    """Losses of one step: in total, and teacher -> part ("summary", "spatial") -> value."""

    total: float
    teachers: Mapping[str, Mapping[str, float]]


class ScalarLogger(Protocol):
    """A log of scalars beside TensorBoard."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log scalars by name."""
        ...

    def close(self) -> None:
        """Finish the log."""
        ...


@final
class MetricsLog:
    """The log of a run: `metrics.jsonl` and TensorBoard. A context manager.

    Args:
        out: folder of the run.
        steps_done: completed steps; later lines of an earlier start are deleted.
        unlogged: losses since the last line, from a checkpoint.
        teachers: all teachers of the run; a step may train with some of them.
        second: another log that gets the same scalars.
    """

    def __init__(
        self,
        out: Path,
        steps_done: int,
        unlogged: LossSums,
        teachers: Sequence[str],
        second: ScalarLogger | None = None,
    ) -> None:
        # A killed run may have logged steps after its last checkpoint.
        _drop_lines_after(out / METRICS_FILE, steps_done)
        self._file = (out / METRICS_FILE).open("a")
        self._events = TensorBoardLog(out / "tensorboard", steps_done + 1)
        self._teachers, self._second = tuple(teachers), second
        # Public: checkpoints save it, so that a resumed run logs the same means.
        self.sums = unlogged
        self._images, self._waits, self._started = 0, Waits(), time.perf_counter()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._events.close()
        if self._second:
            self._second.close()

    def add(self, losses: StepLosses, waits: Waits, num_images: int) -> None:
        """Add the losses of one step. num_images: images of all processes."""
        self._append("loss", losses.total)
        for name, parts in losses.teachers.items():
            for part, value in parts.items():
                self._append(f"{name}/{part}", value)
        self._images += num_images
        for cause, seconds in asdict(waits).items():
            setattr(self._waits, cause, getattr(self._waits, cause) + seconds)

    def write(self, step: int, lr: float, metrics: Mapping[str, float]) -> str:
        """Write the means since the last call, and return the note for the progress line.

        Args:
            step: number of completed steps.
            lr: learning rate of the last step.
            metrics: metrics of this step alone, such as k-NN.
        """
        now = time.perf_counter()
        # Not every step trains every teacher: each mean is over the steps that did.
        means = {key: sum(values) / len(values) for key, values in self.sums.items()}
        seconds = now - self._started
        # As shares of the time since the last line.
        waits = {cause: waited / seconds for cause, waited in asdict(self._waits).items()}
        record: dict[str, Any] = {
            "step": step,
            "loss": means["loss"],
            "lr": lr,
            "images_per_s": self._images / seconds,
            "data_wait": sum(waits.values()),
            "data_wait_by_cause": waits,
            "teachers": {
                name: {part: means.get(f"{name}/{part}") for part in ("summary", "spatial")} for name in self._teachers
            },
            **metrics,
        }
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()  # a killed run leaves its last line
        scalars = {**means, **metrics, "lr": lr, **{f"wait/{cause}": share for cause, share in waits.items()}}
        self._events.add(step, scalars)
        if self._second:
            self._second.log(step, scalars)
        self.sums, self._images, self._waits, self._started = {}, 0, Waits(), now
        return _progress_note(record)

    def _append(self, key: str, value: float) -> None:
        self.sums.setdefault(key, []).append(value)


def _progress_note(record: dict[str, Any]) -> str:
    """Return 'loss 1.2 (summary/spatial: a 0.31/0.54, b 0.60), 210 images/s, waits 3 % (pixels 3 %)'."""
    teachers = [
        f"{name} {_losses(parts)}" for name, parts in record["teachers"].items() if parts["spatial"] is not None
    ]
    causes = [f"{cause} {share:.0%}" for cause, share in record["data_wait_by_cause"].items() if share >= 0.005]
    words = (
        f"loss {record['loss']:.3f} (summary/spatial: {', '.join(teachers)}), {record['images_per_s']:.0f} images/s, "
    )
    words += f"waits {record['data_wait']:.0%}" + (f" ({', '.join(causes)})" if causes else "")
    return words + (f", k-NN {record['knn']:.1%} ± {record['knn_error']:.1%}" if "knn" in record else "")


def _losses(parts: dict[str, float | None]) -> str:
    """Return '0.31/0.54' (summary/spatial), or '0.54' for a teacher without a summary."""
    return "/".join(f"{parts[part]:.2f}" for part in ("summary", "spatial") if parts[part] is not None)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's `metrics.jsonl`, in order; none if there is no file.

    Invalid lines are skipped: one may be cut off where the machine stopped, and a damaged log should not stop a run.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    lines: list[dict[str, Any]] = []
    for line in content.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # deep nesting is a RecursionError of the parser
            continue
        if isinstance(record, dict) and _is_log_line(cast(dict[str, Any], record)):
            lines.append(cast(dict[str, Any], record))
    return lines


def _is_log_line(record: dict[str, Any]) -> bool:
    teachers = record.get("teachers")
    return (
        type(record.get("step")) is int
        and isinstance(teachers, dict)
        and all(
            isinstance(parts, dict)
            and all(value is None or isinstance(value, int | float) for value in cast(dict[str, Any], parts).values())
            for parts in cast(dict[str, Any], teachers).values()
        )
    )


def _drop_lines_after(path: Path, steps_done: int) -> None:
    """Delete the lines of steps that a resumed run repeats, and invalid lines."""
    if path.exists():
        records = [record for record in read_lines(path) if record["step"] <= steps_done]
        write_atomically(path, "".join(f"{json.dumps(record)}\n" for record in records).encode())
