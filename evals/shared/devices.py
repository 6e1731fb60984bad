"""Names of devices on which models run and neighbours are searched."""

from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
