"""What a run tells while it goes: a line, JSON lines, and TensorBoard; means over the steps since the last line."""

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
    """What the losses of a step were: in all, and teacher -> part ("summary", "spatial") -> value."""

    total: float
    teachers: Mapping[str, Mapping[str, float]]


class ScalarLogger(Protocol):
    """Somebody who is told what TensorBoard is."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


@final
class MetricsLog:
    """Averages between two log lines, to `metrics.jsonl` and TensorBoard. A context manager.

    teachers: all of the run; a step may ask some of them. unlogged: of a checkpoint. also: somebody who is told the same.
    """

    def __init__(
        self, out: Path, steps_done: int, unlogged: LossSums, teachers: Sequence[str], also: ScalarLogger | None = None
    ) -> None:
        _drop_lines_after(out / METRICS_FILE, steps_done)
        self._file = (out / METRICS_FILE).open("a")
        self._events = TensorBoardLog(out / "tensorboard", steps_done + 1)
        self._teachers, self._also = tuple(teachers), also
        self.sums = unlogged
        self._images, self._waits, self._started = 0, Waits(), time.perf_counter()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._events.close()
        if self._also:
            self._also.close()

    def add(self, values: StepLosses, waits: Waits, num_images: int) -> None:
        """One step's losses. num_images: over all processes."""
        self._append("loss", values.total)
        for name, parts in values.teachers.items():
            for part, value in parts.items():
                self._append(f"{name}/{part}", value)
        self._images += num_images
        for cause, seconds in asdict(waits).items():
            setattr(self._waits, cause, getattr(self._waits, cause) + seconds)

    def write(self, step: int, lr: float, measured: Mapping[str, float]) -> str:
        """Write the means since the last call; returns what the line shows. measured: of this step alone, such as k-NN."""
        now = time.perf_counter()
        means = {key: sum(values) / len(values) for key, values in self.sums.items()}
        seconds = now - self._started
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
            **measured,
        }
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        told = {**means, **measured, "lr": lr, **{f"wait/{cause}": share for cause, share in waits.items()}}
        self._events.add(step, told)
        if self._also:
            self._also.log(step, told)
        self.sums, self._images, self._waits, self._started = {}, 0, Waits(), now
        return _in_words(record)

    def _append(self, key: str, value: float) -> None:
        self.sums.setdefault(key, []).append(value)


def _in_words(record: dict[str, Any]) -> str:
    """'loss 1.2 (summary/spatial: a 0.31/0.54, b 0.60), 210 images/s, waits 3 % (pixels 3 %)'."""
    told = [f"{name} {_losses(parts)}" for name, parts in record["teachers"].items() if parts["spatial"] is not None]
    causes = [f"{cause} {share:.0%}" for cause, share in record["data_wait_by_cause"].items() if share >= 0.005]
    words = f"loss {record['loss']:.3f} (summary/spatial: {', '.join(told)}), {record['images_per_s']:.0f} images/s, "
    words += f"waits {record['data_wait']:.0%}" + (f" ({', '.join(causes)})" if causes else "")
    return words + (f", k-NN {record['knn']:.1%} ± {record['knn_error']:.1%}" if "knn" in record else "")


def _losses(parts: dict[str, float | None]) -> str:
    """'0.31/0.54' (summary/spatial), or '0.54' for a teacher without a summary."""
    return "/".join(f"{parts[part]:.2f}" for part in ("summary", "spatial") if parts[part] is not None)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's `metrics.jsonl`, in order; none where there is no file.

    Lines that are no log line are left out: one may be cut off where the machine stopped, and a log is no reason to stop a run.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    lines: list[dict[str, Any]] = []
    for line in content.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
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
    """Forget metrics of steps that a resumed run does again, and lines that are none."""
    if path.exists():
        kept = [record for record in read_lines(path) if record["step"] <= steps_done]
        write_atomically(path, "".join(f"{json.dumps(record)}\n" for record in kept).encode())
