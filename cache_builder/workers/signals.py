"""Signals in local Dask workers: Ctrl-C is for the command that started them, which then ends its workers."""

import signal


def dask_setup(worker: object) -> None:
    """Ignore SIGINT. Dask calls this function in the main thread of each worker, by its name."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
