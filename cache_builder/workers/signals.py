"""Signals in local Dask workers: Ctrl-C is for the command that started them, which then ends its workers.

A build has no handler of SIGTERM: it ends at once, and the same command continues from the last receipt. `trainer/loop.py`
handles SIGTERM of a training run.
"""

import signal


def dask_setup(worker: object) -> None:
    """Ignore SIGINT. Dask calls this function in the main thread of each worker, by its name."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
