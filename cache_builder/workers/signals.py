"""Loaded by every local Dask worker: Ctrl-C is for the command that started it, which then ends its workers."""

import signal


def dask_setup(worker: object) -> None:
    """Called by Dask in the worker's main thread."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
