"""Which workers have gone silent: a process that hangs keeps its connections, and is missed by nobody but its heartbeat."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import final

NOTICED_S = 30
"""A worker without a heartbeat for so long is named."""

HUNG_S = 300
"""A worker of this machine without a heartbeat for so long is ended; its parent process starts another. Other schedulers have
`distributed.scheduler.worker-ttl` for that, which is as long unless somebody changed it."""


@final
@dataclass
class Heartbeats:
    """When each worker's last heartbeat came, by this process's clock, which stands still while a laptop sleeps.

    clock: seconds that only grow.
    """

    clock: Callable[[], float] = time.monotonic
    _last: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])

    def silent_s(self, last_seen: Mapping[str, float]) -> dict[str, float]:
        """Address of each worker -> seconds without a heartbeat.

        Args: last_seen: address -> time of its last heartbeat by the scheduler's clock, which is only compared for equality.
        """
        now = self.clock()
        self._last = {
            address: (seen, self._last[address][1] if self._last.get(address, (None, 0.0))[0] == seen else now)
            for address, seen in last_seen.items()
        }
        return {address: now - since for address, (_, since) in self._last.items()}


__all__ = ["HUNG_S", "NOTICED_S", "Heartbeats"]
