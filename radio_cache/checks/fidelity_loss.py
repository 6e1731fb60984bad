"""Shards whose fidelity is clearly below the requested one, because their images differ from those of the calibration."""

from dataclasses import dataclass
from typing import Any, cast

from radio_cache.format.codec_record import CodecRecord
from radio_cache.reader import Cache

LOSS_TIMES, SLACK = 1.25, 0.0002
"""A shard has low fidelity if its loss exceeds the requested one by this factor and by this much.

Shards differ by chance, and calibration aims at 95 % of the requested loss."""


@dataclass(frozen=True)
class LowFidelityShards:
    """asked: the mean cosine that the codec was to keep. shards: (number, measured cosine) of those that drift, the worst
    first; of `num_shards` that were measured."""

    teacher: str
    asked: float
    shards: tuple[tuple[int, float], ...]
    num_shards: int

    def describe(self, place: str) -> str:
        """What is wrong, and the cure. place: of the cache."""
        listed = ", ".join(f"{shard} ({cosine:.4f})" for shard, cosine in self.shards[:5])
        more = f" and {len(self.shards) - 5} more" if len(self.shards) > 5 else ""
        return (
            f"{self.teacher}: {len(self.shards)} of {self.num_shards} shards kept clearly less than the mean cosine of "
            f"{self.asked:.4f} that was asked for: shard {listed}{more}. Their images look otherwise than those its codec was "
            f"calibrated on. To calibrate on all images: radio-cache drop-teacher {place} {self.teacher}, and the build command "
            "again, with a higher --fidelity if that was not enough"
        )


def low_fidelity_of(cache: Cache, name: str) -> LowFidelityShards | None:
    """The shards of a teacher that drift; None if none does, or nothing was asked of its codec."""
    requested = _asked(cache.teachers[name].spec.codec)
    if requested is None:
        return None
    measured = [
        (receipt.shard, receipt.fidelity.cosine)
        for receipt in cache.receipts(name)
        if receipt and receipt.fidelity and receipt.fidelity.num_tokens
    ]
    low = [(shard, cosine) for shard, cosine in measured if 1 - cosine > LOSS_TIMES * (1 - requested) + SLACK]
    return (
        LowFidelityShards(name, requested, tuple(sorted(low, key=lambda one: one[1])), len(measured)) if low else None
    )


def low_fidelity_shards(cache: Cache) -> list[LowFidelityShards]:
    """Of all teachers that can be read."""
    return [drift for name in cache.teachers if (drift := low_fidelity_of(cache, name))]


def _asked(codec: CodecRecord) -> float | None:
    """What was asked for; where that was a step, what it kept on held-out images. Both are only told: a cache may say
    anything."""
    for record, name in ((codec.request, "fidelity"), (codec.calibration, "cosine")):
        value = cast(dict[str, Any], record).get(name) if isinstance(record, dict) else None
        if isinstance(value, float) and 0 < value <= 1:
            return value
    return None
