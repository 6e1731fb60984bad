"""What a cache of a million, a hundred million, a billion images costs, on paper: `python benchmarks/scale.py`.

Arithmetic, no measurement: sizes follow from the registry of teachers, everything else is an assumption that stands in a table
of its own and can be changed on the command line. What was measured to check it is said in docs/scale.md.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from cache_builder.teachers import TEACHERS
from radio_cache.terminal.output import human_bytes

IMAGES = (1_000_000, 100_000_000, 1_000_000_000)
BITS = {"half": 16.0, "packed 0.99": 3.8, "zstd 0.99": 3.0}
"""Bits of a value of a map. klt: EfficientNet-Lite0 (benchmarks/results/2026-11-24-codecs.md); other teachers differ."""

GFLOPS = {"dfn-clip-vit-h-14-378": 1006.0, "dinov2-vit-g-14-reg": 608.3, "sam-vit-h": 5961.1}
"""Of one image at the size each teacher is cached at. SAM and DINOv2 are counted (benchmarks/students.py); CLIP's
follows from the 334.6 counted at 224 px: 2.84 times as many tokens, whose attention grows with their square."""

FILES_A_SHARD = 4
"""Maps, summaries and the statistics of both; the receipt comes on top, until it goes into a log."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Assumptions. Dollars are list prices of one large cloud, rounded, and no offer of anybody."""

    device_tflops: float = 989.0
    utilisation: float = 0.4
    device_hour: float = 2.5
    gigabyte_month: float = 0.023
    thousand_puts: float = 0.005
    thousand_gets: float = 0.0004
    shard_images: int = 128
    epochs: int = 10

    def rows(self) -> list[tuple[str, str]]:
        return [
            (
                "device, dense bfloat16",
                f"{self.device_tflops:,.0f} TFLOP/s, of which {self.utilisation:.0%} are reached",
            ),
            ("device-hour", f"{self.device_hour} $"),
            (
                "object storage",
                f"{self.gigabyte_month} $ a GB and month, {self.thousand_puts} $ a thousand PUTs, "
                f"{self.thousand_gets} $ a thousand GETs",
            ),
            ("images in a shard", f"{self.shard_images:,}"),
            ("epochs of a student's training", f"{self.epochs}"),
        ]


def map_bytes(name: str, codec: str) -> float:
    """Of one image, with its summary in float16."""
    output = TEACHERS[name].output
    assert output is not None
    return output.image_bytes(BITS[codec])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def teachers_table() -> str:
    rows = [[name, f"{GFLOPS[name]:,.0f}", *(human_bytes(map_bytes(name, codec)) for codec in BITS)] for name in GFLOPS]
    rows.append(["all three", f"{sum(GFLOPS.values()):,.0f}", *(human_bytes(_all(codec)) for codec in BITS)])
    return table(["an image", "GFLOP", *BITS], rows)


def _all(codec: str) -> float:
    return sum(map_bytes(name, codec) for name in GFLOPS)


def costs_table(prices: Prices) -> str:
    rows: list[list[str]] = []

    def row(title: str, *cells: str) -> None:
        rows.append([title, *cells])

    def hours(images: int) -> float:
        return images * sum(GFLOPS.values()) / 1000 / (prices.device_tflops * prices.utilisation) / 3600

    def puts(images: int) -> float:
        return images / prices.shard_images * len(GFLOPS) * (FILES_A_SHARD + 1)

    def month(images: int, codec: str) -> str:
        stored_bytes = images * _all(codec)
        return f"{human_bytes(stored_bytes)}, {stored_bytes / 1e9 * prices.gigabyte_month:,.0f} $"

    row("teachers, device-hours", *(f"{hours(n):,.0f}" for n in IMAGES))
    row("teachers, $", *(f"{hours(n) * prices.device_hour:,.0f}" for n in IMAGES))
    online = [hours(n) * prices.device_hour * prices.epochs for n in IMAGES]
    row(f"teachers online instead, a run of {prices.epochs} epochs, $", *(f"{dollars:,.0f}" for dollars in online))
    for codec in BITS:
        row(f"kept as {codec}, a month", *(month(n, codec) for n in IMAGES))
    row("shards of one teacher", *(f"{n / prices.shard_images:,.0f}" for n in IMAGES))
    row("objects, until receipts are in logs", *(f"{puts(n):,.0f}" for n in IMAGES))
    row("PUTs of the build, $", *(f"{puts(n) / 1000 * prices.thousand_puts:,.2f}" for n in IMAGES))
    row(
        "GETs of an epoch, full shuffle, $",
        *(f"{n * len(GFLOPS) / 1000 * prices.thousand_gets:,.2f}" for n in IMAGES),
    )
    row(
        "GETs of an epoch, by blocks of shards, $",
        *(f"{2 * n / prices.shard_images * len(GFLOPS) / 1000 * prices.thousand_gets:,.2f}" for n in IMAGES),
    )
    return table(["three teachers", *(f"{n / 1e6:,.0f} M images" for n in IMAGES)], rows)


def reading_table() -> str:
    rates = (1_000, 10_000, 100_000)
    rows = [[codec, *(f"{human_bytes(rate * _all(codec))}/s" for rate in rates)] for codec in BITS]
    rows.append(["requests a second, full shuffle", *(f"{rate * len(GFLOPS):,}" for rate in rates)])
    return table(["read by students that see", *(f"{rate:,} images/s" for rate in rates)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in Prices().__dict__.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(value), default=value, help="[default: %(default)s]"
        )
    prices = Prices(**vars(parser.parse_args()))
    print(table(["assumed", ""], prices.rows()))
    print(teachers_table())
    print(costs_table(prices))
    print(reading_table())


if __name__ == "__main__":
    main()
