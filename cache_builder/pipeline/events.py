"""Events of a running build: sentences for the user, progress lines, and a log of JSON lines for other programs.

A line of the log is written when its shard is committed. It is appended in one piece, so a build that is killed and started
again, or two builds at once, may share a file. docs/build.md lists the fields.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Collection, Generator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

from cache_builder.build_output import missing_shards
from cache_builder.pipeline.timing import StageSeconds
from radio_cache.errors import ConfigError
from radio_cache.format.schema import IMAGES_UNIT, Receipt
from radio_cache.reader import Cache
from radio_cache.terminal.output import ProgressLine, human_bytes


class BuildEvents:
    """Receiver of all events of a build. This class ignores them; a subclass overrides those that it reports.

    `scanned` and `committed` are called in the thread that wrote the shard, everything else in the thread of the build.
    """

    def message(self, sentence: str) -> None:
        """Report a sentence about the state of the build."""

    def progress(self, num_images: int, note: str = "") -> None:
        """Report that `num_images` more images of the current pass are done. `note` goes into the progress line."""

    def scanned(self, receipt: Receipt) -> None:
        """Report a shard of the scan that is on disk."""

    def committed(self, receipt: Receipt) -> None:
        """Report a shard of a teacher that is on disk. The last one is reported even when the build is stopped."""

    def counting(self, title: str, num_images: int) -> contextlib.AbstractContextManager[object]:
        """Return a context in which `progress` counts towards `num_images`."""
        del title, num_images
        return contextlib.nullcontext()

    def shard_pass(
        self,
        cache: Cache,
        unit: str,
        shards: Collection[int],
        *,
        title: str | None = None,
        stages: StageSeconds | None = None,
    ) -> contextlib.AbstractContextManager[object]:
        """Return a context in which the given shards of a unit are made.

        Args:
            cache: the cache before the pass.
            unit: a teacher, or IMAGES_UNIT for the scan.
            shards: shards that the pass makes; the others of the cache count as done before.
            title: name of the pass in progress lines; the unit if None.
            stages: seconds by stage, which the pass adds to; None if they are not measured.
        """
        del cache, unit, shards, title, stages
        return contextlib.nullcontext()


IGNORED_EVENTS = BuildEvents()
"""For callers that report nothing."""


@final
class ReportedEvents(BuildEvents):
    """Events as sentences, as progress lines on standard error, and as JSON lines in a file.

    Args:
        on_message: receives each sentence; None drops them.
        log_json: file to append JSON lines to; None for no log.

    Raises:
        ConfigError: the log file cannot be written.
    """

    def __init__(self, on_message: Callable[[str], object] | None = None, *, log_json: Path | None = None) -> None:
        self._on_message, self._log = on_message, JsonLinesFile(log_json)
        self._line: ProgressLine | None = None
        self._stages: StageSeconds | None = None
        self._scan: UnitCounts | None = None
        self._unit: UnitCounts | None = None

    def message(self, sentence: str) -> None:
        """Pass the sentence on."""
        if self._on_message is not None:
            self._on_message(sentence)

    def progress(self, num_images: int, note: str = "") -> None:
        """Advance the progress line, with the bottleneck, `note`, and the bytes written so far."""
        bottleneck = self._stages.bottleneck() if self._stages else ""
        written = self._unit.note if self._unit else ""
        if self._line is not None:
            self._line.advance(num_images, ", ".join(filter(None, (bottleneck, note, written))))

    def scanned(self, receipt: Receipt) -> None:
        """Count a shard of the scan, and log it."""
        if self._scan is not None:
            self._scan.add(receipt)

    def committed(self, receipt: Receipt) -> None:
        """Count a shard of the current unit, and log it."""
        if self._unit is not None:
            self._unit.add(receipt)

    @contextlib.contextmanager
    def counting(self, title: str, num_images: int) -> Generator[None]:
        """Show a progress line towards `num_images`."""
        with ProgressLine(title, num_images) as self._line:
            yield
        self._line = None

    @contextlib.contextmanager
    def shard_pass(
        self,
        cache: Cache,
        unit: str,
        shards: Collection[int],
        *,
        title: str | None = None,
        stages: StageSeconds | None = None,
    ) -> Generator[None]:
        """Show a progress line, and log the shards and the whole pass. After Ctrl-C report how much is done."""
        self._stages = stages
        # A teacher's pass also scans the shards that no pass has scanned yet, so it fills two counts.
        self._scan = UnitCounts(self._log, IMAGES_UNIT)
        self._unit = self._scan if unit == IMAGES_UNIT else UnitCounts(self._log, unit, stages)
        num_done = cache.num_images - sum(len(cache.meta.shard_rows(shard)) for shard in shards)
        try:
            if shards:
                with ProgressLine(title or unit, cache.num_images, done=num_done) as self._line:
                    yield
            else:
                yield
        except KeyboardInterrupt:
            # Read anew: the receipts are written by another thread.
            num_left = len(missing_shards(cache, unit))
            self.message(
                f"\n{unit}: {cache.meta.num_shards - num_left} of {cache.meta.num_shards} shards are done and stay"
            )
            self._unit.write_total("stopped")
            raise
        # A pass over scanned shards has nothing to log of the scan.
        if self._scan.images or self._scan.failures:
            self._scan.write_total("scan")
        if unit != IMAGES_UNIT:
            self._unit.write_total("teacher")
        self._line = self._stages = self._scan = self._unit = None


@final
class JsonLinesFile:
    """A file of JSON lines, or nothing for None.

    Raises:
        ConfigError: the file cannot be written; the message names --log-json.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        if file is None:
            return
        try:
            self._append(b"" if _ends_with_newline(file) else b"\n")
        except OSError as exc:
            raise ConfigError(f"--log-json {file}: {exc.strerror or exc}") from exc

    def write(self, event: str, **fields: Any) -> None:
        """Append one line."""
        if self._file is not None:
            line = {"event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}
            self._append(json.dumps(line).encode() + b"\n")

    def _append(self, data: bytes) -> None:
        assert self._file is not None, "lines are only written where there is a file"
        # One write call with O_APPEND: lines of two processes do not mix.
        descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)


def _ends_with_newline(file: Path) -> bool:
    """Return False if a build was killed while it wrote the last line."""
    if not file.exists() or file.stat().st_size == 0:
        return True
    with file.open("rb") as opened:
        # Only the last byte, because a log may be long.
        opened.seek(-1, os.SEEK_END)
        return opened.read() == b"\n"


@final
class UnitCounts:
    """Counts of one unit, the scan or a teacher, over the shards of this run. Safe to call from any thread.

    Args:
        log: receives a line for each shard, and one for the whole unit.
        unit: name of the unit.
        stages: seconds by stage; None if they are not measured.

    Attributes:
        images: usable images.
        failures: images that cannot be used.
        num_bytes: size of all files.
    """

    def __init__(self, log: JsonLinesFile, unit: str, stages: StageSeconds | None = None) -> None:
        self._log, self._unit, self._stages = log, unit, stages
        self.images = self.failures = self.num_bytes = 0
        self._started_s = self._last_line_s = time.perf_counter()
        self._last_stage_seconds = _rounded(stages)
        self._lock = threading.Lock()

    def add(self, receipt: Receipt) -> None:
        """Count a committed shard and write its line."""
        with self._lock:
            now_s, stage_seconds = time.perf_counter(), _rounded(self._stages)
            failures, num_bytes = len(receipt.failures), sum(file.num_bytes for file in receipt.files)
            images = receipt.num_rows - failures
            self.images, self.failures = self.images + images, self.failures + failures
            self.num_bytes += num_bytes
            # Shards overlap in time, so a line holds the time since the line before, not the time of its shard.
            since_last_line = stage_seconds and {
                stage: round(seconds - (self._last_stage_seconds or {})[stage], 3)
                for stage, seconds in stage_seconds.items()
            }
            self._log.write(
                "shard",
                unit=self._unit,
                shard=receipt.shard,
                **_fields(images, failures, num_bytes, now_s - self._last_line_s, since_last_line),
            )
            self._last_line_s, self._last_stage_seconds = now_s, stage_seconds

    def write_total(self, event: str) -> None:
        """Write the line of the whole unit, or of the part of it that was done before the build was stopped."""
        seconds = time.perf_counter() - self._started_s
        counts = _fields(self.images, self.failures, self.num_bytes, seconds, _rounded(self._stages))
        self._log.write(event, unit=self._unit, **counts)

    @property
    def note(self) -> str:
        """Bytes and unusable images, for the progress line."""
        failed = f", {self.failures} unusable" if self.failures else ""
        return f"{human_bytes(self.num_bytes)} written{failed}"


def _rounded(stages: StageSeconds | None) -> dict[str, float] | None:
    return None if stages is None else {name: round(seconds, 3) for name, seconds in stages.to_json().items()}


def _fields(
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


__all__ = ["IGNORED_EVENTS", "BuildEvents", "JsonLinesFile", "ReportedEvents", "UnitCounts"]
