"""Scalars for TensorBoard: an event file, written immediately and in the caller's thread.

torch's own writer buffers up to two minutes of scalars in a thread, whose errors (a full disk, a removed folder) do not reach the
caller.
"""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, final


@final
class TensorBoardLog:
    """An event file of scalars.

    Args:
        folder: folder of event files; created if missing.
        first_step: step of the first scalars to come. TensorBoard hides scalars of this and later steps in earlier files.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2  # heavy, and only a run needs it
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._events, self._summary = cast(Any, event_pb2), cast(Any, summary_pb2).Summary  # no types of their own
        folder.mkdir(exist_ok=True)
        # TensorBoard reads files in the order of their names.
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{first_step:08d}"
        self._records: Any = RecordWriter((folder / name).open("wb"))
        self._write(step=first_step, file_version="brain.Event:2")
        # A session start hides later steps of earlier files, which a resumed run repeats.
        self._write(step=first_step, session_log=self._events.SessionLog(status=self._events.SessionLog.START))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars by name."""
        scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=self._summary(value=scalars))

    def close(self) -> None:
        """Close the file."""
        self._records.close()

    def _write(self, **event: Any) -> None:
        self._records.write(self._events.Event(wall_time=time.time(), **event).SerializeToString())
        self._records.flush()
