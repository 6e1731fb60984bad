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
    """The shards of a teacher whose fidelity is clearly below the requested one.

    Attributes:
        teacher: name of the teacher.
        requested: mean cosine that the user requested.
        shards: (shard, cosine), worst first.
        num_shards: number of measured shards.
    """

    teacher: str
    requested: float
    shards: tuple[tuple[int, float], ...]
    num_shards: int

    def describe(self, place: str) -> str:
        """Describe the loss and the cure, for the cache at `place`."""
        listed = ", ".join(f"{shard} ({cosine:.4f})" for shard, cosine in self.shards[:5])
        more = f" and {len(self.shards) - 5} more" if len(self.shards) > 5 else ""
        return (
            f"{self.teacher}: {len(self.shards)} of {self.num_shards} shards are clearly below the requested mean cosine "
            f"of {self.requested:.4f}: shard {listed}{more}. Their images differ from those that its codec was "
            f"calibrated on. To calibrate on all images: radio-cache drop-teacher {place} {self.teacher}, and the build command "
            "again, with a higher --fidelity if that was not enough"
        )


def low_fidelity_of(cache: Cache, name: str) -> LowFidelityShards | None:
    """Return the low-fidelity shards of a teacher; None if there are none, or no fidelity was requested."""
    requested = _requested_fidelity(cache.teachers[name].spec.codec)
    if requested is None:
        return None
    # Shards without a usable image have no tokens and no fidelity.
    measured = [
        (receipt.shard, receipt.fidelity.cosine)
        for receipt in cache.receipts(name)
        if receipt and receipt.fidelity and receipt.fidelity.num_tokens
    ]
    # Compared as losses, 1 - cosine, because cosines close to 1 hardly differ as a ratio.
    low = [(shard, cosine) for shard, cosine in measured if 1 - cosine > LOSS_TIMES * (1 - requested) + SLACK]
    return (
        LowFidelityShards(name, requested, tuple(sorted(low, key=lambda shard_cosine: shard_cosine[1])), len(measured))
        if low
        else None
    )


def low_fidelity_shards(cache: Cache) -> list[LowFidelityShards]:
    """Return the low-fidelity shards of all readable teachers."""
    return [low for name in cache.teachers if (low := low_fidelity_of(cache, name))]


def _requested_fidelity(codec: CodecRecord) -> float | None:
    """Return the requested fidelity, or, for a requested step, the fidelity on held-out images.

    Both are for information only, so a cache may hold anything there.
    """
    # The request comes first: the held-out cosine only stands in for it.
    for record, name in ((codec.request, "fidelity"), (codec.calibration, "cosine")):
        value = cast(dict[str, Any], record).get(name) if isinstance(record, dict) else None
        if isinstance(value, float) and 0 < value <= 1:
            return value
    return None
