"""What a build tells while it runs: counts for its progress line, and one JSON object a line for other programs.

A line is written when its shard is committed. It is appended in one piece, so a build that is killed and started again, or two
builds at once, may share a file. Fields are in docs/build.md.
"""

import json
import os
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

from cache_builder.pipeline.timing import StageSeconds
from radio_cache.errors import ConfigError
from radio_cache.format.schema import Receipt
from radio_cache.terminal.output import human_bytes


@final
class BuildLog:
    """A file of JSON lines; nothing for None. Raises ConfigError, naming --log-json, if the file cannot be written."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        if file is None:
            return
        try:
            self._append(b"" if _ends_with_a_line(file) else b"\n")
        except OSError as exc:
            raise ConfigError(f"--log-json {file}: {exc.strerror or exc}") from exc

    def write(self, event: str, **fields: Any) -> None:
        """Append one line."""
        if self._file is not None:
            line = {"event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}
            self._append(json.dumps(line).encode() + b"\n")

    def _append(self, data: bytes) -> None:
        assert self._file is not None, "there is a file"
        # One call: what is appended at once is not mixed with the lines of another process.
        there = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(there, data)
        finally:
            os.close(there)


def _ends_with_a_line(file: Path) -> bool:
    """False if a build was killed while it wrote the last one."""
    if not file.exists() or file.stat().st_size == 0:
        return True
    with file.open("rb") as opened:
        opened.seek(-1, os.SEEK_END)
        return opened.read() == b"\n"


@final
class UnitLog:
    """What a build made of one unit, the scan or a teacher: told each shard that is committed, from any thread.

    stages: where the time goes, if that is known here. images: usable ones, failures: those that are not, num_bytes: of all
    files, over the shards of this run.
    """

    def __init__(self, log: BuildLog, unit: str, stages: StageSeconds | None = None) -> None:
        self._log, self._unit, self._stages = log, unit, stages
        self.images = self.failures = self.num_bytes = 0
        self._started = self._last = time.perf_counter()
        self._spent = _rounded(stages)
        self._turn = threading.Lock()

    def shard(self, receipt: Receipt) -> None:
        """A shard is committed. What its line says of time is since the line before: shards overlap."""
        with self._turn:
            now, spent = time.perf_counter(), _rounded(self._stages)
            failures, num_bytes = len(receipt.failures), sum(file.num_bytes for file in receipt.files)
            images = receipt.num_rows - failures
            self.images, self.failures = self.images + images, self.failures + failures
            self.num_bytes += num_bytes
            since = spent and {name: round(spent[name] - (self._spent or {})[name], 3) for name in spent}
            self._log.write(
                "shard",
                unit=self._unit,
                shard=receipt.shard,
                **_counts(images, failures, num_bytes, now - self._last, since),
            )
            self._last, self._spent = now, spent

    def end(self, event: str) -> None:
        """The whole unit is done, or what was done of it before it was stopped."""
        seconds = time.perf_counter() - self._started
        counts = _counts(self.images, self.failures, self.num_bytes, seconds, _rounded(self._stages))
        self._log.write(event, unit=self._unit, **counts)

    @property
    def note(self) -> str:
        """For the progress line."""
        failed = f", {self.failures} unusable" if self.failures else ""
        return f"{human_bytes(self.num_bytes)} written{failed}"


def _rounded(stages: StageSeconds | None) -> dict[str, float] | None:
    return None if stages is None else {name: round(seconds, 3) for name, seconds in stages.to_json().items()}


def _counts(
    images: int, failures: int, num_bytes: int, seconds: float, stages: dict[str, float] | None
) -> dict[str, Any]:
    return {
        "images": images,
        "failures": failures,
        "bytes": num_bytes,
        "seconds": round(seconds, 3),
        "images_per_s": round(images / seconds, 2) if seconds > 0 else None,
        "stage_seconds": stages,
    }
