"""Scalars for TensorBoard, a file of events in a folder. Written at once and in the caller's thread.

torch's own writer keeps up to two minutes of them in a thread, whose errors (a full disk, a folder that is gone) nobody sees
but as its traceback.
"""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, final


@final
class TensorBoardLog:
    """first_step: of the values to come; what earlier files in the folder say of it and of later ones is not shown."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2  # heavy, and only a run needs it
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._events, self._summary = cast(Any, event_pb2), cast(Any, summary_pb2).Summary  # no types of their own
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{first_step:08d}"
        self._records: Any = RecordWriter((folder / name).open("wb"))
        self._write(step=first_step, file_version="brain.Event:2")
        self._write(step=first_step, session_log=self._events.SessionLog(status=self._events.SessionLog.START))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=self._summary(value=scalars))

    def close(self) -> None:
        self._records.close()

    def _write(self, **event: Any) -> None:
        self._records.write(self._events.Event(wall_time=time.time(), **event).SerializeToString())
        self._records.flush()
