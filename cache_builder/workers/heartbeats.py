"""Heartbeats of workers. A process that hangs keeps its connections, so only a missing heartbeat reveals it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import final

NOTICED_S = 30
"""Seconds without a heartbeat after which a worker is reported."""

HUNG_S = 300
"""Seconds without a heartbeat after which a worker of this machine is ended, so that its parent process starts another. Other
schedulers have `distributed.scheduler.worker-ttl` for that, with the same default."""


@final
@dataclass
class Heartbeats:
    """Times of the workers' last heartbeats, by this process's clock, which stands still while a laptop sleeps.

    Attributes:
        clock: returns seconds that only grow.
    """

    clock: Callable[[], float] = time.monotonic
    _last: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])

    def silent_s(self, last_seen: Mapping[str, float]) -> dict[str, float]:
        """Return address -> seconds without a heartbeat.

        Args:
            last_seen: address -> time of the last heartbeat by the scheduler's clock. It is only compared for equality, since
                the two clocks may differ.
        """
        now = self.clock()
        self._last = {
            address: (beat, self._last[address][1] if self._last.get(address, (None, 0.0))[0] == beat else now)
            for address, beat in last_seen.items()
        }
        return {address: now - since for address, (_, since) in self._last.items()}


__all__ = ["HUNG_S", "NOTICED_S", "Heartbeats"]
