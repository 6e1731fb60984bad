"""Seconds that training waited for data. Free of torch, as logs are read without it."""

from dataclasses import dataclass


@dataclass
class Waits:
    """Seconds that a step waited for data, by cause."""

    pixels: float = 0.0
    codes: float = 0.0
    transfer: float = 0.0
